"""The adapters of a run: trained on pairs that are recorded once, kept in its folder."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dreamreader._checked import write_json
from dreamreader._files import explain_disk_errors
from dreamreader.artifacts.file import load_described, save_described
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import SweptPlaces, one_selection
from dreamreader.reft import Pairs, Reft, record_pairs, train
from dreamreader.specs.data import Item, read_items
from dreamreader.specs.parts import AnySeeds, Count, Data, Seeds, listed_seeds
from dreamreader.training.examples import examples_of
from dreamreader.training.losses import AdaptedSites, adapters_of, loss_of
from dreamreader.training.parts import Training

Variant = Literal["loreft", "direft", "noreft", "diagonal", "bias"]
PER_CHANNEL = ("diagonal", "bias")  # variants that have no rank
Key = tuple[str, str, str, int]
"""Condition, name of the cell, variant, rank."""


class TrainedAdapters(Method, SweptPlaces):
    """Base of methods that train adapters at the sites that they sweep."""

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
    training: Training = Field(
        default_factory=Training,
        description="Its variant and rank are those of the sweep.",
    )
    controls: list[Literal["untrained", "difference", "target_prompt"]] = Field(
        default_factory=lambda: ["untrained", "difference", "target_prompt"]
    )

    @property
    def wanted(self) -> list[tuple[str, int]]:
        """Variants with their ranks; a variant without a rank once, as rank 0."""
        every = itertools.product(self.variants, self.ranks)
        found = [(variant, 0 if variant in PER_CHANNEL else rank) for variant, rank in every]
        return list(dict.fromkeys(found))

    @property
    def has_difference(self) -> bool:
        """Whether the difference of means is a control: language-model losses have no pairs."""
        return "difference" in self.controls and self.training.loss in ("activations", "noise")

    def edited_branch(self, job: Job) -> Any:
        """The branch that adapters are trained in, which is the one that they edit."""
        return self.branch if self.branch is not None else job.prompt_branch

    def fit_items(self) -> list[Item]:
        return read_items(self.fit, "method.fit")


@dataclass(eq=False)
class AdapterSet:
    """What the rows of a run are edited with.

    Attributes:
        adapters: by condition, cell, variant and rank.
        differences: mean of the teacher less that of the base by site, [steps, features], or
            [features] where there are no steps.
    """

    adapters: dict[Key, Reft]
    differences: dict[str, Tensor]


def load_or_train(method: TrainedAdapters, job: Job) -> AdapterSet:
    """The adapters of a run folder; those that are missing are trained and written there."""
    assert job.folder is not None
    folder = job.folder.path / "artifacts"
    files = {
        key: folder / f"adapter-{number}.safetensors"
        for number, key in enumerate(_keys(method, job))
    }
    means = folder / "differences.safetensors"
    missing = [key for key, file in files.items() if not file.is_file()]
    if missing or (method.has_difference and not means.is_file()):
        _AdapterBuilder(method, job).make({key: files[key] for key in missing}, means)
    return AdapterSet(
        {key: Reft.load(file) for key, file in files.items()},
        _read(means) if method.has_difference else {},
    )


def evidence_name(number: int) -> str:
    """How the training of an adapter went, in the run folder."""
    return f"artifacts/adapter-{number}.json"


def _keys(method: TrainedAdapters, job: Job) -> list[Key]:
    cells = list(dict.fromkeys(cell.name for cell in method.cells(job)))
    found = [("edited", cell, *kind) for cell in cells for kind in method.wanted]
    if "untrained" in method.controls:
        found += [("untrained", cell, *method.wanted[0]) for cell in cells]
    return found


class _AdapterBuilder:
    """Makes what a run folder lacks; what the loss needs is recorded once for all adapters."""

    def __init__(self, method: TrainedAdapters, job: Job):
        self.method, self.job = method, job
        self.sites = {cell.name: list(cell.sites) for cell in method.cells(job)}
        seeds = listed_seeds(method.fit_seeds)
        items = method.fit_items()
        self.examples = examples_of(method.training, items, seeds, label="method.fit")
        every = list(dict.fromkeys(site for listed in self.sites.values() for site in listed))
        self.place = AdaptedSites(
            job.reader,
            every,
            branch=method.edited_branch(job) or "cond",
            tokens=one_selection(method.cells(job), "adapters are trained for"),
            settings={} if job.is_language else job.settings,
            batch=job.batch,
        )

    def make(self, files: dict[Key, Path], means: Path) -> None:
        assert self.job.folder is not None
        made = {key: self._adapters(*key) for key in files}  # refuses a rank above a width
        learning = any(condition == "edited" for condition, *_ in made)
        loss = loss_of(self.method.training, self.place, self.examples) if learning else None
        with explain_disk_errors(self.job.folder.path):
            means.parent.mkdir(parents=True, exist_ok=True)
            for key, reft in made.items():
                condition, cell, variant, rank = key
                if loss is not None and condition == "edited":
                    history = train(reft, loss, **self.method.training.recipe)
                    note = {"cell": cell, "variant": variant, "rank": rank} | _note(reft, history)
                    write_json(files[key].with_suffix(".json"), note)
                reft.save(files[key])
            if self.method.has_difference and not means.is_file():
                _write(self._pairs(), means)

    def _adapters(self, condition: str, cell: str, variant: str, rank: int) -> Reft:
        changes: dict[str, Any] = {"variant": variant, "rank": max(rank, 1)}
        if condition == "untrained":
            changes["init"] = "pyreft"
        made = self.method.training.model_copy(update=changes)
        return adapters_of(made, replace(self.place, sites=self.sites[cell]))

    def _pairs(self) -> Pairs:
        """The recorded pairs of the first seed, for their means."""
        place, one = self.place, self.examples.few(len(self.examples.prompts))
        given = {"branch": place.branch, "batch_size": place.batch, **(place.settings or {})}
        return record_pairs(
            place.reader,
            one.prompts,
            one.partners,
            place.sites,
            seeds=one.row_seeds,
            trajectory=self.method.training.trajectory,
            tokens=place.tokens,
            **given,
        )


def _note(reft: Reft, history: Any) -> dict[str, Any]:
    return {
        "parameters": sum(each.numel() for each in reft.parameters()),
        "steps": len(history.losses),
        "first_loss": history.losses[0],
        "last_loss": history.losses[-1],
        "validation": history.validation,
        "best": history.best,
    }


def _write(pairs: Pairs, file: Path) -> None:
    """Differences of means over rows and their tokens, for each call."""
    found = {}
    for site, base in pairs.base.items():
        weights = pairs.token_weights(site, torch.arange(pairs.rows)) / pairs.rows  # [rows, tokens]
        off = pairs.teacher[site].double() - base.double()
        off = torch.einsum("rt,rctw->cw", weights.to(off), off).float()  # [calls, width]
        found[site] = off[0] if pairs.steps is None else _by_step(off, pairs.steps)
    save_described(file, "differences", found, {})


def _by_step(values: Tensor, steps: Sequence[int]) -> Tensor:
    """[steps, width]: the mean over the calls of a step."""
    index = torch.tensor(steps)
    total = torch.zeros(max(steps) + 1, values.shape[1]).index_add(0, index, values)
    return total / torch.bincount(index).clamp(min=1).unsqueeze(1)


def _read(file: Path) -> dict[str, Tensor]:
    return load_described(file, "differences")[1]
