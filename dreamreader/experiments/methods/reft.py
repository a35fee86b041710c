"""Learned edits: adapters trained on pairs of prompts, swept over variants, ranks and strengths."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from dreamreader import edits as kinds
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.base import RowTable, alphas, selection_of
from dreamreader.experiments.methods.reft_adapters import (
    AdapterSet,
    TrainedAdapters,
    load_or_train,
)
from dreamreader.experiments.row import Row
from dreamreader.specs.data import read_items

KEEP = "method.training.keep.data"


class ReftMethod(TrainedAdapters):
    """Trains adapters on pairs of prompts, and applies them to the prompts of `data`.

    Rows have columns `variant` and `rank`. Controls: adapters that were not trained (with random
    weight and bias, of the first variant and rank), steering by the difference of means of the same
    pairs, and the target prompt itself where `data` are pairs.
    """

    kind: Literal["reft"] = "reft"
    strengths: list[float] = Field(default_factory=lambda: [1.0], min_length=1)
    effect: str | None = Field(
        None, description="Column of a metric that the best setting is chosen by."
    )

    def check(self, job: Job) -> None:
        if self.training.loss == "denoising":
            raise InvalidInput(
                "method.training.loss: denoising needs pictures; use `dreamreader reft train`"
            )
        self.check_cells(
            job, variants=len(self.wanted) + len(self.controls), strengths=len(self.strengths)
        )

    def inputs(self, job: Job) -> dict[str, Any]:
        pairs = [[each.prompt, each.target, dict(each.columns)] for each in self.fit_items()]
        keep = self.training.keep
        kept = [] if keep is None else [e.prompt for e in read_items(keep.data, KEEP)]
        return {"fit": hashlib.sha256(repr((pairs, kept)).encode()).hexdigest()}

    def rows(self, job: Job) -> list[Row]:
        table = RowTable()
        pairs = table.add_unedited(job, self.controls)
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

    def prepare(self, job: Job) -> None:
        """Adapters of the run folder; those that are missing are trained and written there."""
        job.memory["trained"] = load_or_train(self, job)

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        made: AdapterSet = job.memory["trained"]
        found: list[Any] = []
        for (condition, cell, *kind), alpha in alphas(rows, "variant", "rank").items():
            chosen = selection_of(cell) | {"branch": self.edited_branch(job)}
            if condition == "difference":
                vectors = {site: made.differences[site] for site in cell.sites}
                found.append(kinds.Steer(cell.sites, vectors, alpha, **chosen))
            else:
                found += made.adapters[condition, cell.name, *kind].edits(alpha, **chosen)
        return found
