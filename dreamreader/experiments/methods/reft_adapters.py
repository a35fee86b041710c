"""The adapters of a run: trained on pairs that are recorded once, kept in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreamreader.experiments.methods.base import one_selection
from dreamreader.reft import Pairs, Reft, record_pairs, train
from dreamreader.specs.parts import listed_seeds
from dreamreader.training.examples import examples_of
from dreamreader.training.losses import AdaptedSites, adapters_of, loss_of

if TYPE_CHECKING:
    from dreamreader.experiments.job import Job
    from dreamreader.experiments.methods.reft import Reft as Method

Key = tuple[str, str, str, int]
"""Condition, name of the cell, variant, rank."""


@dataclass(eq=False)
class Trained:
    """What the rows of a run are edited with.

    Attributes:
        adapters: by condition, cell, variant and rank.
        differences: mean of the teacher less that of the base by site, [steps, features], or
            [features] where there are no steps.
    """

    adapters: dict[Key, Reft]
    differences: dict[str, Tensor]


def trained(method: "Method", job: "Job") -> Trained:
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
        _Workshop(method, job).make({key: files[key] for key in missing}, means)
    return Trained(
        {key: Reft.load(file) for key, file in files.items()},
        _read(means) if method.has_difference else {},
    )


def evidence_name(number: int) -> str:
    """How the training of an adapter went, in the run folder."""
    return f"artifacts/adapter-{number}.json"


def _keys(method: "Method", job: "Job") -> list[Key]:
    cells = list(dict.fromkeys(cell.name for cell in method.cells(job)))
    found = [("edited", cell, *kind) for cell in cells for kind in method.wanted]
    if "untrained" in method.controls:
        found += [("untrained", cell, *method.wanted[0]) for cell in cells]
    return found


class _Workshop:
    """Makes what a run folder lacks; what the loss needs is recorded once for all adapters."""

    def __init__(self, method: "Method", job: "Job"):
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
        from dreamreader._checked import write_json
        from dreamreader._files import explained

        assert self.job.folder is not None
        made = {key: self._adapters(*key) for key in files}  # refuses a rank above a width
        learning = any(condition == "edited" for condition, *_ in made)
        loss = loss_of(self.method.training, self.place, self.examples) if learning else None
        with explained(self.job.folder.path):
            means.parent.mkdir(parents=True, exist_ok=True)
            for key, reft in made.items():
                condition, cell, variant, rank = key
                if loss is not None and condition == "edited":
                    history = train(reft, loss, **self.method.training.recipe)
                    note = {"cell": cell, "variant": variant, "rank": rank} | _told(reft, history)
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


def _told(reft: Reft, history: Any) -> dict[str, Any]:
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
    from dreamreader._tensor_files import save_described

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
    from dreamreader._tensor_files import load_described

    return load_described(file, "differences")[1]
