"""Transfer: directions of another model, mapped, beside the subject's own."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dreamreader import edits as kinds
from dreamreader._files import explain_disk_errors
from dreamreader.engine import Cache, row_means
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, SweptPlaces, alphas
from dreamreader.experiments.methods.steer import SteerMethod
from dreamreader.experiments.row import Row
from dreamreader.jobs import hash_weights
from dreamreader.localise import ablate_edits
from dreamreader.mapping import (
    METHODS,
    ActivationMap,
    PairedRows,
    fit_map,
    map_direction,
    score_map,
)
from dreamreader.recording import record_between
from dreamreader.recording.labelled import joined_rows
from dreamreader.recording.schedules import noise_levels
from dreamreader.specs.data import Item, pairs_only, read_items
from dreamreader.specs.parts import AnySeeds, AnySubject, Data, Part, Seeds, listed_seeds
from dreamreader.specs.subject import open_subject
from dreamreader.steering import Directions
from dreamreader.sweep import records_of

CONTROLS = ("random_direction", "unmapped", "mean_ablated", "target_prompt")


class MapChoice(Part):
    """How a map from the source to the subject is fitted."""

    method: str = Field("ridge", description="Of `dreamreader.mapping.fit_map`.")
    options: dict[str, Any] = Field(default_factory=dict, description="Of that method.")


class TransferMethod(Method, SweptPlaces):
    """Fits a direction in another model, maps it to the subject and adds it to its prompts.

    Conditions: `edited`, the mapped direction of each map (column `map`); `native`, the subject's
    own direction of the same pairs; `random_direction` and `unmapped` (cut, or padded with zeros),
    both with the norms of the native one; `mean_ablated`, the means of the prompts of `map_data` at
    the cell; the target prompt itself where `data` are pairs.
    """

    kind: Literal["transfer"] = "transfer"
    source: AnySubject = Field(description="The model that directions come from.")
    source_sites: dict[str, str] = Field(
        default_factory=dict,
        description="Site of the source for each site of the subject; of the same name by default.",
    )
    maps: dict[str, MapChoice] = Field(
        default_factory=lambda: {"ridge": MapChoice()}, min_length=1, description="Maps by name."
    )
    map_data: Data = Field(description="Prompts that the maps are fitted to.")
    map_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=300_000), description="Seeds of these prompts."
    )
    trajectory: Literal["own", "source", "target"] = Field(
        "own", description="Latents of the pairs of the maps: own, or those of one for both."
    )
    fit: Data = Field(description="Pairs that directions are fitted from, in both models.")
    fit_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=100_000), description="Seeds of the pairs."
    )
    direction: Literal["mean", "caa", "pca", "lda", "logistic"] = "mean"
    per_step: bool = Field(True, description="A direction for every step, or one for all.")
    strengths: list[float] = Field(min_length=1, description="Multiples of the directions.")
    effect: str | None = Field(
        None, description="Column of a metric that the best cell and strength are chosen by."
    )
    controls: list[Literal["random_direction", "unmapped", "mean_ablated", "target_prompt"]] = (
        Field(default_factory=lambda: list(CONTROLS))
    )

    @model_validator(mode="after")
    def _known_maps(self) -> "TransferMethod":
        for name, each in self.maps.items():
            if each.method not in METHODS:
                raise ValueError(f"maps.{name}: {UnknownName('method', each.method, METHODS)}")
            if name in ("native", *CONTROLS):
                raise ValueError(f"maps: {name} is the name of a condition; choose another")
        return self

    def check(self, job: Job) -> None:
        if job.is_language:
            raise InvalidInput("method.kind: transfer is of pipelines; this is a language model")
        conditions = len(self.maps) + len(self.controls) + 1
        self.check_cells(job, strengths=len(self.strengths), conditions=conditions)
        unknown = [site for site in self.source_sites if site not in self._sites(job)]
        if unknown:
            raise UnknownName(
                "method.source_sites: site of the cells", unknown[0], self._sites(job)
            )

    def inputs(self, job: Job) -> dict[str, Any]:
        pairs = [[each.prompt, each.target] for each in self._fit_items()]
        mapped = [each.prompt for each in read_items(self.map_data, "method.map_data")]
        return {
            "fit": hashlib.sha256(repr((pairs, mapped)).encode()).hexdigest(),
            "source": hash_weights(self.source_job(job).reader.subject),
        }

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
        for name in self.maps:
            yield "edited", {"map": name}
        for name in ("random_direction", "unmapped"):
            if name in self.controls:
                yield name, {}

    def prepare(self, job: Job) -> None:
        """Maps and directions of the run folder; what is missing is fitted and written there."""
        assert job.folder is not None
        files = {n: self.directions_file(job.folder.path, n) for n in self._fitted}
        if not all(file.is_file() for file in files.values()):
            with job.pause_counting():
                made = self._fit(job)
            with explain_disk_errors(job.folder.path):
                for name, file in files.items():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    made[name].save(file)
        found = {name: Directions.load(file) for name, file in files.items()}
        job.memory["directions"] = found | {"random_direction": found["native"].random(seed=1)}

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        directions = job.memory["directions"]
        found: list[Any] = [
            kinds.Steer(
                cell.sites,
                directions[condition if name is None else name].only(*cell.sites).vectors,
                alpha,
                **cell.selection,
            )
            for (condition, cell, name), alpha in alphas(rows, "map").items()
        ]
        ablated = [row.cell if row.condition == "mean_ablated" else None for row in rows]
        if any(ablated):
            found += ablate_edits(ablated, "mean", self._means(job))
        return found

    def directions_file(self, folder: Path, name: str) -> Path:
        """Of `native`, `unmapped` or the name of a map."""
        return folder / "artifacts" / f"directions-{name.replace(' ', '-')}.safetensors"

    def map_file(self, folder: Path, name: str, site: str) -> Path:
        """The map of a name to a site, with its scores on held-out prompts on its card."""
        return folder / "artifacts" / f"map-{name.replace(' ', '-')}-{site}.safetensors"

    def source_job(self, job: Job) -> Job:
        """The same call on the source."""
        if "source" not in job.memory:
            spec = job.spec.model_copy(update={"subject": self.source})
            job.memory["source"] = Job(
                spec, open_subject(self.source), job.items, [], job.folder, job.batch
            )
        return job.memory["source"]

    @property
    def _fitted(self) -> list[str]:
        """Names of the directions that are written."""
        return ["native", *self.maps, *(["unmapped"] if "unmapped" in self.controls else [])]

    def _sites(self, job: Job) -> list[str]:
        return list(dict.fromkeys(site for cell in self.cells(job) for site in cell.sites))

    def _fit(self, job: Job) -> dict[str, Directions]:
        """Directions of both models, and those of the source through each map."""
        assert job.folder is not None
        source, sites = self.source_job(job), self._sites(job)
        partner = {site: self.source_sites.get(site, site) for site in sites}
        native = self._directions(job, sites)
        theirs = self._directions(source, list(partner.values()))
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self._fitted}
        for site, rows, levels in self._pairs(job, source, partner):
            vector = theirs[partner[site]]
            train, held = rows.split(0.2)
            for name, choice in self.maps.items():
                own = self._fit_map(job, train, name, choice)
                own = own.with_card(scores=score_map(own, held, draws=200).as_dict())
                file = self.map_file(job.folder.path, name, site)
                file.parent.mkdir(parents=True, exist_ok=True)
                own.save(file)
                found[name][site] = map_direction(own, vector, level=levels)
            padded = map_direction(fit_map(train, "identity"), vector)
            if "unmapped" in found:
                found["unmapped"][site] = _with_norms(padded, native[site])
        found["native"] = dict(native)
        return {name: replace(native, vectors=own, evidence={}) for name, own in found.items()}

    def _directions(self, job: Job, sites: Sequence[str]) -> Directions:
        own = SteerMethod(
            sites=list(dict.fromkeys(sites)), group="all", branch=self.branch, tokens=self.tokens,
            fit=self.fit, fit_seeds=self.fit_seeds, direction=self.direction,
            per_step=self.per_step, strengths=[1.0], controls=[],
        )  # fmt: skip
        cells = job.memory.pop("cells", None)  # of the whole sweep
        try:
            return own.fit_directions(job, ["edited"])["edited"]
        finally:
            job.memory.pop("cells", None)
            if cells is not None:
                job.memory["cells"] = cells

    def _pairs(
        self, job: Job, source: Job, partner: Mapping[str, str]
    ) -> Iterator[tuple[str, PairedRows, Tensor | None]]:
        """For each site its rows in both models, and the noise level of each step."""
        items = read_items(self.map_data, "method.map_data")
        drawn = [(item.prompt, seed) for item in items for seed in listed_seeds(self.map_seeds)]
        pairs = record_between(
            source.reader, job.reader, [prompt for prompt, _ in drawn],
            list(dict.fromkeys(partner.values())), list(partner),
            seeds=[seed for _, seed in drawn], trajectory=self.trajectory,
            branch=job.prompt_branch or "cond", batch_size=job.batch, progress=False,
            source_arguments=source.settings, target_arguments=job.settings,
        )  # fmt: skip
        calls = None if pairs.times is None else pairs.times[1]
        levels = None if calls is None else noise_levels(job.reader.subject.scheduler, calls)
        by_step = None
        if levels is not None and calls is not None and self.per_step:
            known = dict(zip((each.step for each in calls), levels, strict=True))
            by_step = torch.tensor([known[step] for step in range(job.steps or len(known))])
        for site, theirs in partner.items():
            yield site, PairedRows.of(pairs, theirs, site, levels=levels), by_step

    def _fit_map(self, job: Job, train: PairedRows, name: str, choice: MapChoice) -> ActivationMap:
        try:
            return fit_map(
                train, choice.method, source_model=self.source.model,
                target_model=job.spec.subject.model, **choice.options,
            )  # fmt: skip
        except InvalidInput as error:
            raise InvalidInput(f"method.maps.{name}: {error}") from error

    def _means(self, job: Job) -> Cache:
        """Means of the subject's activations over the prompts of the maps."""
        if "means" not in job.memory:
            items = read_items(self.map_data, "method.map_data")
            drawn = [(item.prompt, seed) for item in items for seed in listed_seeds(self.map_seeds)]
            with job.pause_counting():
                found = joined_rows(job.record(drawn, records_of(self.cells(job))))
            job.memory["means"] = Cache([row_means(each) for each in found.values()])
        return job.memory["means"]

    def _fit_items(self) -> list[Item]:
        items = read_items(self.fit, "method.fit")
        pairs_only(items, "method.fit")
        return items


def _with_norms(vector: Tensor, like: Tensor) -> Tensor:
    """A vector, step by step, with the norms of another."""
    norm = vector.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
    return vector * (like.norm(dim=-1, keepdim=True) / norm)
