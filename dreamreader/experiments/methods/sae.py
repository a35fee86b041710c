"""Latents of a sparse autoencoder, switched while pictures are made: which of them do what?"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, SweptPlaces, load_saved, selection_of
from dreamreader.experiments.row import Row
from dreamreader.sae import SAEEdit, SparseAutoencoder
from dreamreader.specs.parts import Part

NEAREST = 16  # latents of about the same frequency, of which one is drawn


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

    Rows have a column `features`, the name of the latents that were changed. Controls: as many
    other latents of about the same frequency, and the target prompt itself where `data` are pairs.
    """

    kind: Literal["sae"] = "sae"
    autoencoder: AutoencoderFile
    features: list[int] | dict[str, list[int]] = Field(
        description="Latents, each alone; or named sets, each changed together.", min_length=1
    )
    op: Literal["add", "scale", "set", "ablate"] = "set"
    strengths: list[float] = Field(
        default_factory=lambda: [1.0],
        min_length=1,
        description="The value that is added, multiplied with or set; for ablate the strength.",
    )
    gate: float | None = Field(None, description="Changes only codes above this.")
    keep_error: bool = Field(True, description="What the autoencoder does not explain stays.")
    effect: str | None = Field(
        None, description="Column of a metric that the best setting is chosen by."
    )
    controls: list[Literal["random_features", "target_prompt"]] = Field(
        default_factory=lambda: ["random_features", "target_prompt"]
    )

    @model_validator(mode="after")
    def _some(self) -> "SaeMethod":
        if isinstance(self.features, dict):
            empty = [name for name, own in self.features.items() if not own]
            if empty:
                raise ValueError(f"features.{empty[0]}: is empty")
        return self

    @property
    def sets(self) -> dict[str, tuple[int, ...]]:
        """Latents that are changed together, by name."""
        if isinstance(self.features, dict):
            return {name: tuple(own) for name, own in self.features.items()}
        return {str(each): (each,) for each in self.features}

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
        conditions = 1 + ("random_features" in self.controls)
        self.check_cells(job, features=len(self.sets) * conditions, strengths=len(self.strengths))

    def inputs(self, job: Job) -> dict[str, Any]:
        return {"autoencoder": dict(self.autoencoder.loaded.state_dict())}

    def rows(self, job: Job) -> list[Row]:
        table = RowTable()
        pairs = table.add_unedited(job, self.controls)
        swept = itertools.product(self._conditions(), self.cells(job), self.sets, self.strengths)
        for condition, cell, name, strength in swept:
            for item, seed in pairs:
                axes = {"features": name}
                table.add(item, seed, condition, cell=cell, strength=strength, axes=axes)
        return table.rows

    def prepare(self, job: Job) -> None:
        """Draws the latents of the control."""
        job.memory["sets"] = {"edited": self.sets, "random_features": self.random_sets()}

    def random_sets(self) -> dict[str, tuple[int, ...]]:
        """For each set others, each of about the frequency of one of its latents."""
        if "random_features" not in self.controls:
            return {}
        draw = torch.Generator().manual_seed(0)
        frequency = self.autoencoder.loaded.statistics["frequency"].double()
        found = {}
        for name, own in self.sets.items():
            taken = set(own)
            for feature in own:
                near = (frequency - frequency[feature]).abs().argsort(stable=True).tolist()
                free = [each for each in near if each not in taken][:NEAREST]
                if not free:
                    raise InvalidInput(f"method.features: {name} leaves no latents for a control")
                taken.add(free[int(torch.randint(len(free), (), generator=draw))])
            found[name] = tuple(sorted(taken - set(own)))
        return found

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        sets, sae = job.memory["sets"], self.autoencoder.loaded
        groups: dict[tuple[Any, ...], list[float]] = {}
        for number, row in enumerate(rows):
            if row.cell is None or row.strength is None:
                continue
            # a value of 0 is one like others; an ablation of strength 0 is none
            value, alpha = (None, row.strength) if self.op == "ablate" else (row.strength, 1.0)
            key = (row.condition, row.cell, row.axes["features"], value)
            groups.setdefault(key, [0.0] * len(rows))[number] = alpha
        return [
            SAEEdit(
                cell.sites,
                sae,
                sets[condition][name],
                self.op,
                value,
                alpha,
                gate=self.gate,
                keep_error=self.keep_error,
                **selection_of(cell),
            )
            for (condition, cell, name, value), alpha in groups.items()
            if any(alpha)
        ]

    def _conditions(self) -> Iterator[str]:
        yield "edited"
        if "random_features" in self.controls:
            yield "random_features"
