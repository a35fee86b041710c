"""Steering: directions fitted from pairs, swept over strengths, sites and step windows."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from dreamreader import edits as kinds
from dreamreader._files import explain_disk_errors
from dreamreader.engine import Cache, Record
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, SweptPlaces, alphas, load_saved
from dreamreader.experiments.row import Row
from dreamreader.recording.labelled import mean_over_tokens
from dreamreader.specs.data import Item, pairs_only, read_items
from dreamreader.specs.parts import AnySeeds, Data, Part, Seeds, listed_seeds
from dreamreader.steering import Directions, Fitter
from dreamreader.steering.methods import NEEDS

CONTROLS = ("random_direction", "shuffled_labels", "target_prompt")
_FILES = {"edited": "directions", "shuffled_labels": "directions-shuffled"}


class DirectionsFile(Part):
    """Directions that were fitted before."""

    file: str = Field(description="Written by `Directions.save`, with every site of the cells.")

    def load(self) -> Directions:
        """What is in it.

        Raises:
            InvalidInput: it is missing, damaged, or of another kind.
        """
        return load_saved(Directions, self.file, "directions")


class SteerMethod(Method, SweptPlaces):
    """Fits a direction from pairs of prompts at every site, and adds it to the prompts of `data`.

    Controls: a random direction of the same norms, the direction of shuffled labels brought to the
    same norms, and the target prompt itself where `data` are pairs.
    """

    kind: Literal["steer"] = "steer"
    fit: Data | None = Field(None, description="Pairs that the directions are fitted from.")
    fit_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=100_000), description="Seeds of the pairs."
    )
    directions: DirectionsFile | None = Field(
        None, description="Directions of a file, instead of fit."
    )
    direction: Literal["mean", "caa", "pca", "lda", "logistic"] = Field(
        "mean", description="How a direction follows from the pairs, see `dreamreader.steering`."
    )
    norm: Literal["none", "channel", "tensor"] | None = None
    per_step: bool = Field(True, description="A direction for every step, or one for all.")
    strengths: list[float] = Field(min_length=1, description="Multiples of the direction.")
    norm_match: bool = Field(False, description="Every token keeps its norm.")
    asymmetric: bool = Field(
        False, description="Change only the predicted picture of each step (Asyrp)."
    )
    effect: str | None = Field(
        None, description="Column of a metric that the best cell and strength are chosen by."
    )
    controls: list[Literal["random_direction", "shuffled_labels", "target_prompt"]] = Field(
        default_factory=lambda: list(CONTROLS)
    )

    @model_validator(mode="after")
    def _one_source(self) -> "SteerMethod":
        if (self.fit is None) == (self.directions is None):
            raise ValueError("give one of fit and directions")
        if self.directions is not None and "shuffled_labels" in self.controls:
            raise ValueError(
                "controls: directions of a file have no labels to shuffle; leave shuffled_labels "
                "out of controls"
            )
        return self

    @property
    def swept(self) -> list[str]:
        """Conditions that are run at every cell and strength."""
        return ["edited", *(each for each in self.controls if each != "target_prompt")]

    def check(self, job: Job) -> None:
        axes = {"strengths": len(self.strengths), "conditions": len(self.swept)}
        self.check_cells(job, **axes)

    def inputs(self, job: Job) -> dict[str, Any]:
        if self.directions is not None:
            return {"directions": dict(self.directions.load())}
        pairs = [[item.prompt, item.target] for item in self._fit_items()]
        return {"fit": hashlib.sha256(repr(pairs).encode()).hexdigest()}

    def rows(self, job: Job) -> list[Row]:
        cells = self.cells(job)
        table = RowTable()
        pairs = table.add_unedited(job, self.controls)
        for condition in self.swept:
            for cell in cells:
                for strength in self.strengths:
                    for item, seed in pairs:
                        table.add(item, seed, condition, cell=cell, strength=strength)
        return table.rows

    def prepare(self, job: Job) -> None:
        """Directions of the run folder; those that are missing are fitted and written there."""
        assert job.folder is not None
        files = {
            name: self.directions_file(job.folder.path, name)
            for name in ("edited", "shuffled_labels")
            if name in self.swept
        }
        missing = [name for name, file in files.items() if not file.is_file()]
        fitted: dict[str, Directions] = {}
        if missing and self.directions is not None:
            fitted["edited"] = self.directions.load()
        elif missing:
            fitted = self.fit_directions(job, missing)
        found: dict[str, Directions] = {}
        for name, file in files.items():
            if name in missing:
                made = fitted[name]
                _write(made if name == "edited" else _of_norms(made, found["edited"]), file)
            found[name] = Directions.load(file)
        job.memory["directions"] = {**found, "random_direction": found["edited"].random(seed=1)}

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        return [
            kinds.Steer(
                cell.sites,
                job.memory["directions"][condition].only(*cell.sites).vectors,
                alpha,
                norm_match=self.norm_match,
                **cell.selection,
            )
            for (condition, cell), alpha in alphas(rows).items()
        ]

    def around(self, job: Job) -> AbstractContextManager[Any]:
        if not self.asymmetric:
            return nullcontext()
        from dreamreader.localise.hspace import asymmetric

        return asymmetric(job.reader)

    def directions_file(self, folder: Path, condition: str = "edited") -> Path:
        return folder / "artifacts" / f"{_FILES[condition]}.safetensors"

    def fit_directions(self, job: Job, conditions: Sequence[str]) -> dict[str, Directions]:
        """Directions of the fit's pairs in one pass; where labels are shuffled, source and target
        are swapped in a random half of the pairs."""
        steps = "each" if self.per_step and not job.is_language else "shared"
        keep: Any = "rows" if self.direction in NEEDS else "moments"
        fitters = {name: Fitter(steps=steps, keep=keep) for name in conditions}
        draw = torch.Generator().manual_seed(0)
        for source, target in self._record(job):
            count = len(next(iter(source.values())).rows)
            swap = torch.rand(count, generator=draw) < 0.5
            for name, fitter in fitters.items():
                if name == "edited":
                    fitter.add_pairs(source, target)
                else:
                    fitter.add_pairs(
                        _swap_rows(source, target, swap), _swap_rows(target, source, swap)
                    )
        return {
            name: fitter.fit("source", "target", self.direction, norm=self.norm)
            for name, fitter in fitters.items()
        }

    def _fit_items(self) -> list[Item]:
        assert self.fit is not None
        items = read_items(self.fit, "method.fit")
        pairs_only(items, "method.fit")
        return items

    def _record(self, job: Job) -> Iterator[tuple[Any, Any]]:
        """Caches of both prompts of the pairs, batch by batch."""
        pairs = [
            (item, seed) for item in self._fit_items() for seed in listed_seeds(self.fit_seeds)
        ]
        records = self._readings(job)
        sources = job.record([(item.prompt, seed) for item, seed in pairs], records)
        targets = job.record([(str(item.target), seed) for item, seed in pairs], records)
        return zip(sources, targets, strict=True)

    def _readings(self, job: Job) -> list[Any]:
        """A recording for every site: the mean over the cell's tokens."""
        found: dict[str, Any] = {}
        for cell in self.cells(job):
            chosen = cell.selection["tokens"]
            for site in cell.sites:
                held = found.setdefault(site, chosen)
                if held != chosen:
                    raise InvalidInput(
                        f"method.tokens: {site} is steered at different tokens ({held}, {chosen}); "
                        "a direction is fitted from one selection, write a spec for each"
                    )
        branch = self.branch if self.branch is not None else job.prompt_branch
        return [
            Record(site, branch=branch, tokens=tokens, reduce=mean_over_tokens)
            for site, tokens in found.items()
        ]


def _write(directions: Directions, file: Path) -> None:
    with explain_disk_errors(file.parent.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        directions.save(file)


def _swap_rows(a: Any, b: Any, swap: torch.Tensor) -> dict[str, Any]:
    """Rows of a, those of b where swapped."""
    found = {}
    for site in a:
        mask = swap.reshape(-1, *(1,) * (a[site].tensor.dim() - 1))
        found[site] = replace(a[site], tensor=torch.where(mask, b[site].tensor, a[site].tensor))
    return Cache(list(found.values()))  # pyright: ignore[reportReturnType]


def _of_norms(directions: Directions, like: Directions) -> Directions:
    """Directions scaled, step by step, to the norms of others."""
    vectors = {}
    for site, vector in directions.items():
        norm = vector.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
        vectors[site] = vector * (like[site].norm(dim=-1, keepdim=True) / norm)
    return replace(directions, vectors=vectors)
