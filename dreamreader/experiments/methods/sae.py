"""Latents of a sparse autoencoder, switched while pictures are made: which of them do what?"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from dreamreader.edits import Steer
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, SweptPlaces, load_saved, selection_of
from dreamreader.experiments.methods.sae_choice import (
    FeatureSet,
    LatentChoice,
    LatentMeans,
    load_or_measure,
)
from dreamreader.experiments.methods.sae_trials import DIFFERENCE, Trials, load_or_choose
from dreamreader.experiments.row import Row
from dreamreader.sae import SAEEdit, SparseAutoencoder
from dreamreader.specs.parts import Part

NEAREST = 16  # latents of about the same frequency, of which one is drawn
Named = Mapping[tuple[str, str], FeatureSet]
"""Latents by condition and name."""


class AutoencoderFile(Part):
    """An autoencoder that was trained before."""

    file: str = Field(description="Of kind sae, as a training of autoencoders writes it.")

    @cached_property
    def loaded(self) -> SparseAutoencoder:
        """What is in it, ready to be used.

        Raises:
            InvalidInput: it is missing, damaged, or of another kind.
        """
        return load_saved(SparseAutoencoder, self.file, "autoencoder")


class SaeMethod(Method, SweptPlaces):
    """Changes latents at the sites where the autoencoder was trained, on the prompts of `data`.

    Which ones, says `features`, or `choose` finds them by what they do to other pictures. Rows have
    a column `features`, the name of the latents that were changed, and with `choose` a column
    `target`, the label that they were chosen for. Controls: as many other latents of about the same
    frequency, brought to the same values; with `choose` a difference of means (`difference`), in
    strengths of its own; the target prompt itself where `data` are pairs.
    """

    kind: Literal["sae"] = "sae"
    autoencoder: AutoencoderFile
    features: Annotated[list[int] | dict[str, list[int]], Field(min_length=1)] | None = Field(
        None, description="Latents, each alone; or named sets, each changed together."
    )
    choose: LatentChoice | None = Field(None, description="How latents are found; no features.")
    op: Literal["add", "scale", "set", "ablate"] = "set"
    strengths: list[float] = Field(
        default_factory=lambda: [1.0],
        min_length=1,
        description="The value that is added, multiplied with or set; for ablate the strength. "
        "With choose, add and set: multiples of the mean code of a label.",
    )
    gate: float | None = Field(None, description="Changes only codes above this.")
    keep_error: bool = Field(True, description="What the autoencoder does not explain stays.")
    difference_strengths: list[float] = Field(
        default_factory=lambda: [1.0, 2.0, 4.0, 8.0],
        min_length=1,
        description="Multiples of the difference of means.",
    )
    effect: str | None = Field(
        None, description="Column of a metric that the best setting is chosen by."
    )
    controls: list[Literal["random_features", "difference", "target_prompt"]] = Field(
        default_factory=lambda: ["random_features", "difference", "target_prompt"]
    )

    @model_validator(mode="after")
    def _some(self) -> "SaeMethod":
        if (self.features is None) == (self.choose is None):
            raise ValueError("give one of features and choose")
        if self.choose is not None and self.choose.goal == "add" and self.op in ("scale", "ablate"):
            raise ValueError(f"op: {self.op} changes only codes that are there; to add, take set")
        if self.choose is not None and self.choose.goal == "remove" and self.op == "set":
            raise ValueError("op: set brings a label's latents to their level; to remove, ablate")
        if isinstance(self.features, dict):
            empty = [name for name, own in self.features.items() if not own]
            if empty:
                raise ValueError(f"features.{empty[0]}: is empty")
        return self

    @property
    def sets(self) -> dict[str, tuple[int, ...]]:
        """Latents that are changed together, by name; of `choose` only the names are known."""
        if self.choose is not None:
            return {name: () for name, _ in self.choose.names()}
        if isinstance(self.features, dict):
            return {name: tuple(own) for name, own in self.features.items()}
        return {str(each): (each,) for each in self.features or ()}

    def check(self, job: Job) -> None:
        sae = self.autoencoder.loaded
        for name, own in self.sets.items():
            wrong = [each for each in own if not 0 <= each < sae.d_sae]
            if wrong:
                raise InvalidInput(
                    f"method.features: latent {wrong[0]} of {name} is none of {sae.d_sae}"
                )
        if "random_features" in self.controls and "frequency" not in sae.statistics:
            raise InvalidInput(
                f"method.controls: {self.autoencoder.file} does not say how often its latents are "
                "active, which random_features needs; leave it out of controls"
            )
        settings = sum(len(names) * len(strengths) for _, names, strengths in self._sweeps())
        self.check_cells(job, settings=settings)
        if self.choose is not None:
            self._check_choice(job, self.choose)

    def _check_choice(self, job: Job, choose: LatentChoice) -> None:
        cells = self.cells(job)
        if len(cells) != 1 or len(cells[0].sites) != 1:
            raise InvalidInput(
                f"method.choose: latents are chosen at one site, got {len(cells)} cells; write a "
                "spec for each, with the autoencoder of its site"
            )
        for item in job.items:
            choose.label_of(item)
            if "target" in item.columns:
                raise InvalidInput(
                    f"method.choose: entry {item.id!r} of data has a column 'target', which is "
                    "that of the labels to choose for; rename it, or give scenes without target"
                )
        choose.items("trial")

    def inputs(self, job: Job) -> dict[str, Any]:
        found: dict[str, Any] = {"autoencoder": dict(self.autoencoder.loaded.state_dict())}
        if self.choose is not None:
            found["choose"] = self.choose.digest()
        return found

    def rows(self, job: Job) -> list[Row]:
        table, choose = RowTable(), self.choose
        pairs = table.add_unedited(job, self.controls)
        for condition, names, strengths in self._sweeps():
            for cell, (name, label), strength in itertools.product(
                self.cells(job), names.items(), strengths
            ):
                axes = {"features": name} | ({} if label is None else {"target": label})
                for item, seed in pairs:
                    if choose is None or label is None or choose.concerns(item, label):
                        table.add(item, seed, condition, cell=cell, strength=strength, axes=axes)
        return table.rows

    def _sweeps(self) -> Iterator[tuple[str, dict[str, str | None], list[float]]]:
        """Conditions with the names of their latents, the labels of these, and strengths."""
        names: dict[str, str | None] = dict.fromkeys(self.sets)
        if self.choose is not None:
            names |= dict(self.choose.names())
        yield "edited", names, self.strengths
        if "random_features" in self.controls:
            yield "random_features", names, self.strengths
        if DIFFERENCE in self.controls and self.choose is not None:
            yield (
                DIFFERENCE,
                {each: each for each in self.choose.labels()},
                self.difference_strengths,
            )

    def prepare(self, job: Job) -> None:
        """Chooses latents where the run folder has none yet, and draws those of the control."""
        if self.choose is None:
            chosen = {name: FeatureSet(own) for name, own in self.sets.items()}
        else:
            chosen = self._choose(job, self.choose)
        named = {("edited", name): own for name, own in chosen.items()}
        if "random_features" in self.controls:
            named |= {("random_features", n): own for n, own in self.random_sets(chosen).items()}
        job.memory["sets"] = named

    def _choose(self, job: Job, choose: LatentChoice) -> dict[str, FeatureSet]:
        (cell,) = self.cells(job)
        branch = self.branch if self.branch is not None else job.prompt_branch
        options = {**selection_of(cell), "branch": branch}
        means = load_or_measure(job, choose, self.autoencoder.loaded, cell.sites[0], options)
        job.memory["means"] = means
        trials = Trials(job, choose, cell, lambda rows, named: self._edits(job, rows, named))
        plain = self.difference_strengths if DIFFERENCE in self.controls else None
        return load_or_choose(trials, means, self.strengths, plain)

    def random_sets(self, sets: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
        """For each set others, each of about the frequency of one of its latents, at its level."""
        draw = torch.Generator().manual_seed(0)
        frequency = self.autoencoder.loaded.statistics["frequency"].double()
        found = {}
        for name, own in sets.items():
            taken, drawn = set(own.features), []
            for feature in own.features:
                near = (frequency - frequency[feature]).abs().argsort(stable=True).tolist()
                free = [each for each in near if each not in taken][:NEAREST]
                if not free:
                    raise InvalidInput(f"method.features: {name} leaves no latents for a control")
                drawn.append(free[int(torch.randint(len(free), (), generator=draw))])
                taken.add(drawn[-1])
            found[name] = FeatureSet(tuple(drawn), own.levels, own.where)
        return found

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        return self._edits(job, rows, job.memory["sets"])

    def _edits(self, job: Job, rows: Sequence[Row], named: Named) -> list[Any]:
        groups: dict[tuple[Any, ...], list[float]] = {}
        for number, row in enumerate(rows):
            if row.cell is None or row.strength is None:
                continue
            # a value of 0 is one like others; an ablation of strength 0 is none
            as_alpha = self.op == "ablate" or row.condition == DIFFERENCE
            value, alpha = (None, row.strength) if as_alpha else (row.strength, 1.0)
            name = row.axes["target" if row.condition == DIFFERENCE else "features"]
            key = (row.condition, row.cell, name, value)
            groups.setdefault(key, [0.0] * len(rows))[number] = alpha
        found: list[Any] = []
        for (condition, cell, name, value), alpha in groups.items():
            if condition == DIFFERENCE:
                found.append(self._difference(job, cell, name, alpha))
            elif any(alpha):
                found.append(self._edit(cell, named[condition, name], value, alpha))
        return found

    def _edit(self, cell: Any, latents: FeatureSet, value: float | None, alpha: list[float]) -> Any:
        levelled = value is not None and self.op in ("add", "set")
        return SAEEdit(
            cell.sites,
            self.autoencoder.loaded,
            latents.features,
            self.op,
            latents.values(value) if value is not None and levelled else value,
            alpha,
            gate=self.gate,
            keep_error=self.keep_error,
            where=latents.where,
            **selection_of(cell),
        )

    def _difference(self, job: Job, cell: Any, label: str, alpha: list[float]) -> Any:
        """Adds what a label's mean has beside those of the others, or takes it out."""
        means: LatentMeans = job.memory["means"]
        assert self.choose is not None
        vector = means.differences[means.labels.index(label)]
        signed = vector if self.choose.goal == "add" else -vector
        return Steer(cell.sites, {site: signed for site in cell.sites}, alpha, **selection_of(cell))
