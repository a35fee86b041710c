"""Transfer: directions, latents and edits of another model, mapped, beside the subject's own."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from dreamreader import edits as kinds
from dreamreader.engine import Cache, row_means
from dreamreader.errors import UnknownName
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.base import RowTable, alphas, selection_of
from dreamreader.experiments.methods.transfer_base import Carried, in_file
from dreamreader.experiments.methods.transfer_fits import carried_directions, carried_edits
from dreamreader.experiments.methods.transfer_language import check_kinds, token_means
from dreamreader.experiments.methods.transfer_latents import (
    CarriedLatents,
    carried_latents,
    check_explained,
    check_latents,
    latent_directions,
    latent_inputs,
)
from dreamreader.experiments.row import Row
from dreamreader.jobs import hash_weights
from dreamreader.localise import ablate_edits, patch_edits
from dreamreader.mapping import PairedRows
from dreamreader.recording.labelled import joined_rows
from dreamreader.specs.data import pairs_only, read_items
from dreamreader.specs.parts import listed_seeds
from dreamreader.sweep import records_of

AFFINE = ("identity", "procrustes", "ridge", "reduced_rank", "anchors", "affine")
CONTROLS = ("random_direction", "unmapped", "mean_ablated", "target_prompt")


class TransferMethod(Carried):
    """Finds a direction, latents or a learned edit in another model, and uses them mapped.

    Conditions: `edited`, what each map gives (column `map`); `native`, the subject's own of the
    same pairs, or its own latents; `random_direction`, of the norms of the native one, or an edit
    that was not trained; `unmapped`, cut, or padded with zeros, a direction with the norms of the
    native one;
    `mean_ablated`, the means of the prompts of `map_data` at the cell (of a language model one
    mean of all paired tokens); the target prompt itself where `data` are pairs.
    """

    kind: Literal["transfer"] = "transfer"
    carry: Literal["direction", "loreft", "sae_feature"] = Field(
        "direction",
        description="A difference of prompts, an edit that is trained on them, or latents of an "
        "autoencoder.",
    )
    feature: CarriedLatents | None = Field(None, description="Which latents, for sae_feature.")
    strengths: list[float] = Field(min_length=1, description="Multiples of what is carried.")
    effect: str | None = Field(
        None, description="Column of a metric that the best cell and strength are chosen by."
    )
    controls: list[Literal["random_direction", "unmapped", "mean_ablated", "target_prompt"]] = (
        Field(default_factory=lambda: list(CONTROLS))
    )

    @model_validator(mode="after")
    def _known_maps(self) -> "TransferMethod":
        if len(set(map(in_file, self.named_maps))) < len(self.maps):
            raise ValueError("maps: two have one name, or the same but for spaces; name them apart")
        for name, each in self.named_maps.items():
            if self.reads_back and each.method not in AFFINE:
                raise ValueError(
                    f"maps.{name}: an edit is read and written by affine maps "
                    f"({', '.join(AFFINE)}), {each.method} is none"
                    + ("; or take feature.use: direction" if self.feature else "")
                )
            if name.replace(" ", "_") in ("native", "unedited", *CONTROLS):
                raise ValueError(f"maps: {name} is the name of a condition; choose another")
        return self

    @model_validator(mode="after")
    def _complete(self) -> "TransferMethod":
        if (self.carry == "sae_feature") != (self.feature is not None):
            raise ValueError(
                "feature: says which latents are carried, which needs carry: sae_feature, and "
                "carry: sae_feature needs it"
            )
        if self.fit is None and (self.feature is None or self.feature.native is None):
            raise ValueError("fit: pairs of prompts are needed, from which the subject's own is")
        return self

    @property
    def reads_back(self) -> bool:
        """Whether activations of the subject are read through maps to the source."""
        whole = self.feature is not None and self.feature.use == "autoencoder"
        return self.carry == "loreft" or whole

    @property
    def has_unmapped(self) -> bool:
        return "unmapped" in self.controls

    @property
    def has_edits(self) -> bool:
        return self.carry == "loreft"

    def check(self, job: Job) -> None:
        check_kinds(self, job)
        conditions = len(self.maps) + len(self.controls) + 1
        self.check_cells(job, strengths=len(self.strengths), conditions=conditions)
        known = self.partners(job)
        for site in self.source_sites:
            if site not in known:
                raise UnknownName("method.source_sites: site of the cells", site, known)
        if self.feature is not None:
            check_latents(self, self.feature, job)

    def check_rows(self, rows: PairedRows) -> None:
        if self.feature is not None:
            check_explained(self.feature, rows)

    def inputs(self, job: Job) -> dict[str, Any]:
        items = [] if self.fit is None else read_items(self.fit, "method.fit")
        pairs_only(items, "method.fit")
        pairs = [[each.prompt, each.target] for each in items]
        mapped = [each.prompt for each in read_items(self.map_data, "method.map_data")]
        found = {
            "fit": hashlib.sha256(repr((pairs, mapped)).encode()).hexdigest(),
            "source": hash_weights(self.source_job(job).reader.subject),
        }
        return found if self.feature is None else found | latent_inputs(self.feature)

    def rows(self, job: Job) -> list[Row]:
        table = RowTable()
        pairs = table.add_unedited(job, self.controls)
        for condition, axes in self._sweeps():
            for cell in self.cells(job):
                for strength in self.strengths:
                    for item, seed in pairs:
                        table.add(item, seed, condition, cell=cell, strength=strength, axes=axes)
        if "mean_ablated" in self.controls:
            for cell in self.cells(job):
                for item, seed in pairs:
                    table.add(item, seed, "mean_ablated", cell=cell)
        return table.rows

    def _sweeps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Conditions that are run at every cell and strength."""
        yield "native", {}
        for name in self.named_maps:
            yield "edited", {"map": name}
        for name in ("random_direction", "unmapped"):
            if name in self.controls:
                yield name, {}

    def prepare(self, job: Job) -> None:
        """Maps and directions of the run folder; what is missing is fitted and written there."""
        assert job.folder is not None
        own = self.feature
        if self.reads_back:
            found = carried_edits(self, job) if own is None else carried_latents(self, own, job)
            job.memory["carried"] = found
            return
        find = None if own is None else partial(latent_directions, self, own, job)
        found = carried_directions(self, job, find)
        job.memory["carried"] = found | {"random_direction": found["native"].random(seed=1)}

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        found: list[Any] = []
        for (condition, cell, name), alpha in alphas(rows, "map").items():
            carried = job.memory["carried"][condition if name is None else name]
            if self.reads_back:
                found += carried(alpha, cell.sites, **selection_of(cell))
            else:
                vectors = carried.only(*cell.sites).vectors
                found.append(kinds.Steer(cell.sites, vectors, alpha, **cell.selection))
        ablated = [row.cell if row.condition == "mean_ablated" else None for row in rows]
        if any(ablated) and job.is_language:
            if "means" not in job.memory:
                job.memory["means"] = token_means(self, job)
            found += patch_edits(ablated, job.memory["means"])
        elif any(ablated):
            found += ablate_edits(ablated, "mean", self._means(job))
        return found

    def _means(self, job: Job) -> Cache:
        """Means of the subject's activations over the prompts of the maps."""
        if "means" not in job.memory:
            items = read_items(self.map_data, "method.map_data")
            drawn = [(item.prompt, seed) for item in items for seed in listed_seeds(self.map_seeds)]
            with job.pause_counting():
                found = joined_rows(job.record(drawn, records_of(self.cells(job))))
            job.memory["means"] = Cache([row_means(each) for each in found.values()])
        return job.memory["means"]
