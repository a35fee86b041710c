"""Causal localisation: activations of one prompt of a pair in the run of the other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dreamreader.engine import tokenize
from dreamreader.errors import InvalidInput
from dreamreader.experiments.methods.base import Places, Table, counted
from dreamreader.experiments.methods.chunked import Chunked, others
from dreamreader.experiments.row import Row
from dreamreader.localise import patch_edits, window_cells
from dreamreader.recording.labelled import evenly
from dreamreader.sweep import Cell
from dreamreader.sweep.run import check_pairs

if TYPE_CHECKING:
    from dreamreader.experiments.job import Job


class Patching(Chunked):
    """What all methods share that take activations from the other prompt of a pair.

    A chunk of pairs is run with the prompts that take (`corrupted`), with those that give
    (`clean`), then once for every cell.
    """

    pairs: ClassVar[bool] = True
    base: ClassVar[str] = "corrupted"
    changed: ClassVar[str] = "patched"
    control: ClassVar[str] = "resampled"
    control_title: ClassVar[str] = "from another corrupted run (control)"
    goal: ClassVar[str | None] = "clean"

    direction: Literal["restore", "corrupt"] = Field(
        "restore",
        description="restore: activations of the target in runs of the source; corrupt: reverse.",
    )
    controls: list[Literal["resampled"]] = Field(
        default_factory=lambda: ["resampled"],
        description="resampled: the same cells take the corrupted activations of another pair.",
    )

    def cells(self, job: "Job") -> list[Cell]:
        raise NotImplementedError

    def read_cells(self, job: "Job") -> list[Cell]:
        return self.cells(job)

    def gives(self, condition: str) -> bool:
        return condition == "clean" or (condition == "corrupted" and bool(self.controls))

    def check(self, job: "Job") -> None:
        targets, sources = [i.target for i in job.items], [i.prompt for i in job.items]
        cells = self.cells(job)
        check_pairs(job.reader, targets, sources, cells, self.direction)
        if job.is_language and self.controls and any(cell.tokens is None for cell in cells):
            takes = sources if self.direction == "restore" else targets
            _check_control(list(map(len, tokenize(job.reader, list(map(str, takes)))[0])))

    def rows(self, job: "Job") -> list[Row]:
        cells = self.cells(job)
        pairs = [(item, seed) for item in job.items for seed in job.seeds]
        table, restores = Table(), self.direction == "restore"
        for start, stop in evenly(len(pairs), job.batch):
            chunk = list(enumerate(pairs[start:stop]))
            for n, (item, seed) in chunk:
                table.add(item, seed, "corrupted", target=not restores, entry=n)
            table.next_group()
            for n, (item, seed) in chunk:
                table.add(item, seed, "clean", target=restores, entry=n, base="corrupted")
            table.next_group()
            for condition in ("patched", *(self.controls if len(chunk) > 1 else ())):
                for cell in cells:
                    for n, (item, seed) in chunk:
                        table.add(
                            item,
                            seed,
                            condition,
                            target=not restores,
                            cell=cell,
                            entry=n,
                            base="corrupted",
                        )
                table.next_group()
        return table.rows

    def edits_of(self, job: "Job", rows: Sequence[Row]) -> list[Any]:
        cells = [row.cell for row in rows]
        if not any(cells):
            return []
        if rows[0].condition == "patched":
            source = self.source(job, rows[0].group - 1)
            return list(patch_edits(cells, source, [row.entry for row in rows]))
        source = self.source(job, rows[0].group - 3)
        return list(patch_edits(cells, source, others(rows, source)))


def _check_control(counts: Sequence[int]) -> None:
    """Refuse prompts that would take the values of a shorter one."""
    if min(counts) < max(counts):
        raise InvalidInput(
            f"method.controls: resampled gives each prompt the values of another one, token by "
            f"token, and they have {min(counts)} to {max(counts)} tokens; give method.tokens that "
            "all have, prompts with as many, or controls: []"
        )


class Patch(Patching, Places):
    """Patches every cell of a grid of sites, step windows, tokens and heads."""

    kind: Literal["patch"] = "patch"

    def cells(self, job: "Job") -> list[Cell]:
        return Places.cells(self, job)

    def check(self, job: "Job") -> None:
        self.check_cells(job, 1 + len(self.controls))
        super().check(job)


class Windows(Patching):
    """LocoGen: the other prompt's text in a few cross-attention layers in a row, at every start."""

    kind: Literal["windows"] = "windows"
    span: int = Field(3, ge=1, description="Layers in a window.")

    def cells(self, job: "Job") -> list[Cell]:
        if job.is_language:
            raise InvalidInput("method windows needs a diffusers pipeline")
        if "cells" not in job.memory:
            job.memory["cells"] = window_cells(job.reader, self.span)
        return job.memory["cells"]

    def check(self, job: "Job") -> None:
        super().check(job)
        cells = len(self.cells(job)) * (1 + len(self.controls))
        counted(cells=cells, prompts=len(job.items), seeds=len(job.seeds))
