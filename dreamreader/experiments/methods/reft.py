"""Learned edits: adapters trained on pairs of prompts, swept over variants, ranks and strengths."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dreamreader import edits as kinds
from dreamreader.errors import InvalidInput
from dreamreader.experiments.methods.base import Method, Places, Table, alphas, selection_of
from dreamreader.experiments.row import Row
from dreamreader.specs.data import Item, read_items
from dreamreader.specs.parts import AnySeeds, Count, Data, Seeds
from dreamreader.training.parts import Training

if TYPE_CHECKING:
    from dreamreader.experiments.job import Job
    from dreamreader.experiments.methods.reft_adapters import Trained
    from dreamreader.experiments.results import Results
    from dreamreader.report import Number, Section

Variant = Literal["loreft", "direft", "noreft", "diagonal", "bias"]
KEEP = "method.training.keep.data"
PER_CHANNEL = ("diagonal", "bias")  # variants that have no rank


class Reft(Method, Places):
    """Trains adapters on pairs of prompts, and applies them to the prompts of `data`.

    Rows have columns `variant` and `rank`. Controls: adapters that were not trained (with random
    weight and bias, of the first variant and rank), steering by the difference of means of the same
    pairs, and the target prompt itself where `data` are pairs.
    """

    kind: Literal["reft"] = "reft"
    fit: Data = Field(
        description="Pairs of prompts; for the loss language, prompts with a column completion."
    )
    fit_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=100_000), description="Seeds of the pairs."
    )
    group: Literal["each", "block", "all"] | dict[str, str | list[str]] = Field(
        "all", description="Which sites change together: each alone, by block, all, or named sets."
    )
    variants: list[Variant] = Field(default_factory=lambda: ["loreft"], min_length=1)
    ranks: list[Count] = Field(default_factory=lambda: [8], min_length=1)
    strengths: list[float] = Field(default_factory=lambda: [1.0], min_length=1)
    training: Training = Field(
        default_factory=Training,
        description="Its variant and rank are those of the sweep.",
    )
    effect: str | None = Field(
        None, description="Column of a metric that the best setting is chosen by."
    )
    controls: list[Literal["untrained", "difference", "target_prompt"]] = Field(
        default_factory=lambda: ["untrained", "difference", "target_prompt"]
    )

    def check(self, job: "Job") -> None:
        if self.training.loss == "denoising":
            raise InvalidInput(
                "method.training.loss: denoising needs pictures; use `dreamreader reft train`"
            )
        self.check_cells(
            job, variants=len(self.wanted) + len(self.controls), strengths=len(self.strengths)
        )

    def inputs(self, job: "Job") -> dict[str, Any]:
        pairs = [[each.prompt, each.target, dict(each.columns)] for each in self.fit_items()]
        keep = self.training.keep
        kept = [] if keep is None else [e.prompt for e in read_items(keep.data, KEEP)]
        return {"fit": hashlib.sha256(repr((pairs, kept)).encode()).hexdigest()}

    @property
    def wanted(self) -> list[tuple[str, int]]:
        """Variants with their ranks; a variant without a rank once, as rank 0."""
        every = itertools.product(self.variants, self.ranks)
        found = [(variant, 0 if variant in PER_CHANNEL else rank) for variant, rank in every]
        return list(dict.fromkeys(found))

    def rows(self, job: "Job") -> list[Row]:
        pairs = [(item, seed) for item in job.items for seed in job.seeds]
        table = Table()
        for item, seed in pairs:
            table.add(item, seed, "unedited")
        if "target_prompt" in self.controls and all(item.target for item, _ in pairs):
            for item, seed in pairs:
                table.add(item, seed, "target_prompt", target=True)
        for condition, axes in self._sweeps():
            for cell, strength in itertools.product(self.cells(job), self.strengths):
                for item, seed in pairs:
                    table.add(item, seed, condition, cell=cell, strength=strength, axes=axes)
        return table.rows

    def _sweeps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Conditions that are run at every cell and strength, with the adapter of each."""
        for variant, rank in self.wanted:
            yield "edited", {"variant": variant, "rank": rank}
        if "untrained" in self.controls:
            yield "untrained", dict(zip(("variant", "rank"), self.wanted[0], strict=True))
        if self.has_difference:
            yield "difference", {}

    @property
    def has_difference(self) -> bool:
        """Whether the difference of means is a control: language-model losses have no pairs."""
        return "difference" in self.controls and self.training.loss in ("activations", "noise")

    def prepare(self, job: "Job") -> None:
        """Adapters of the run folder; those that are missing are trained and written there."""
        from dreamreader.experiments.methods.reft_adapters import trained

        job.memory["trained"] = trained(self, job)

    def edits_of(self, job: "Job", rows: Sequence[Row]) -> list[Any]:
        made: Trained = job.memory["trained"]
        found: list[Any] = []
        for (condition, cell, *kind), alpha in alphas(rows, "variant", "rank").items():
            chosen = selection_of(cell) | {"branch": self.edited_branch(job)}
            if condition == "difference":
                vectors = {site: made.differences[site] for site in cell.sites}
                found.append(kinds.Steer(cell.sites, vectors, alpha, **chosen))
            else:
                found += made.adapters[condition, cell.name, *kind].edits(alpha, **chosen)
        return found

    def edited_branch(self, job: "Job") -> Any:
        """The branch that adapters are trained in, which is the one that they edit."""
        return self.branch if self.branch is not None else job.prompt_branch

    def fit_items(self) -> list[Item]:
        return read_items(self.fit, "method.fit")

    def numbers(self, results: "Results") -> "list[Number]":
        from dreamreader.experiments.methods.reft_page import numbers

        return numbers(self, results)

    def shown(self, results: "Results") -> dict[str, Any]:
        from dreamreader.experiments.methods.reft_page import best

        return best(self, results)

    def sections(self, results: "Results") -> "list[Section]":
        from dreamreader.experiments.methods.reft_page import sections

        return sections(self, results)

    def summary(self, results: "Results") -> list[str]:
        from dreamreader.experiments.methods.reft_page import summary

        return summary(self, results)
