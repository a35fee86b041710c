"""Running a sweep: every cell on every pair as rows of shared batches, measured as they come."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dreamreader._progress import Progress, ProgressEvent, show_progress
from dreamreader.engine import Record, Row, RunResult, plan_rows, tokenize
from dreamreader.errors import InvalidInput
from dreamreader.sweep.cells import Cell
from dreamreader.sweep.grids import Values

if TYPE_CHECKING:
    from dreamreader.engine import Reader

Metric = Callable[[RunResult], Sequence[float] | Tensor | Values]
"""From a run to one number for each of its rows; `result.rows[i].index` is the number of the pair,
whatever the cell. NaN: there is nothing to measure."""

_BATCHES = 4  # a run of the sweep holds about so many batches, and the edits of its cells only


@dataclass(frozen=True)
class SweepJob:
    """Prompts and seeds of the rows, and how they are run.

    Attributes:
        arguments: of the pipeline; entries with one value for each row are repeated with the rows.
    """

    reader: "Reader"
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: Metric
    batch_size: int | None
    arguments: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rows(self) -> tuple[Row, ...]:
        pairs = zip(self.prompts, self.seeds, strict=True)
        return tuple(Row(n, prompt, seed) for n, (prompt, seed) in enumerate(pairs))

    def run(
        self, repeats: int = 1, edits: Sequence[Any] = (), record: Sequence[Any] = ()
    ) -> tuple[RunResult, Values]:
        """All rows `repeats` times over, cell by cell, and their metric [repeats * rows]."""
        result = self.reader.run(
            list(self.prompts) * repeats,
            edits=list(edits),
            record=list(record),
            seeds=list(self.seeds) * repeats,
            batch_size=self.batch_size,
            progress=False,
            **_repeat_arguments(self.arguments, len(self), repeats),
        )
        result = replace(result, rows=self.rows * repeats)
        return result, _values(self.metric(result), len(self) * repeats)


def job(
    reader: "Reader",
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    metric: Metric,
    batch_size: int | None,
    arguments: Mapping[str, Any],
) -> SweepJob:
    """Prompts and seeds brought to one length, as in `Reader.run`.

    Raises:
        InvalidInput: they do not fit, or the metric cannot be called.
    """
    if not callable(metric):
        raise InvalidInput(f"metric: a function of a RunResult is needed, got {metric!r}")
    if batch_size is not None and batch_size < 1:
        raise InvalidInput(f"batch_size must be at least 1, got {batch_size}")
    plan = plan_rows(prompts, seeds, ())
    return SweepJob(reader, plan.prompts, plan.seeds, metric, batch_size, dict(arguments))


def over_cells(
    cells: Sequence[Cell],
    work: SweepJob,
    edits_of: Callable[[list[Cell | None], list[int]], Sequence[Any]],
    progress: Progress = True,
) -> Values:
    """Gives the metric [cells, rows] of every cell on every row.

    Each run takes whole cells over all rows, so that prompts of a language model are padded alike
    everywhere, and holds the edits of these cells only.

    Args:
        cells: the sweep.
        work: rows of one cell.
        edits_of: from the cell and the pair of each row of a run to its edits.
        progress: shown by default, or a function of a `ProgressEvent`, or False.

    Raises:
        InvalidInput: there are no cells, or nothing is edited in a run of cells that have sites.
    """
    if not cells:
        raise InvalidInput("over_cells: no cells are given")
    count = len(work)
    at_once = len(cells)
    if work.batch_size is not None:
        at_once = max(1, min(at_once, _BATCHES * work.batch_size // count))
    found = []
    with show_progress(progress) as report:
        for start in range(0, len(cells), at_once):
            report(ProgressEvent("cells", start, len(cells)))
            chosen = cells[start : start + at_once]
            of_rows: list[Cell | None] = [cell for cell in chosen for _ in range(count)]
            edits = edits_of(of_rows, list(range(count)) * len(chosen))
            if not edits and (meant := [cell.label for cell in chosen if cell.sites]):
                raise InvalidInput(
                    f"over_cells: edits_of gives no edits for {', '.join(meant[:3])}; a cell that "
                    "stays as it is has no sites"
                )
            _, values = work.run(len(chosen), edits)
            found.append(values.reshape(len(chosen), count))
        report(ProgressEvent("cells", len(cells), len(cells)))
    return np.concatenate(found)


def resolve_cells(reader: "Reader", cells: Sequence[Cell]) -> list[Cell]:
    """The cells with the names of their sites in full.

    Raises:
        InvalidInput: there are no cells.
        UnknownName: a site does not exist.
    """
    if not cells:
        raise InvalidInput("the grid is empty: no cells are given")
    names: dict[str, tuple[str, ...]] = {}
    for cell in cells:
        if not isinstance(cell, Cell):
            raise InvalidInput(f"cells: a Cell expected, got {type(cell).__name__} {cell!r}")
        for site in cell.sites:
            if site not in names:
                names[site] = tuple(reader.sites(site).names)
    found = []
    for cell in cells:
        if not cell.sites:
            raise InvalidInput(f"cell {cell.label!r} has no sites")
        sites = dict.fromkeys(name for site in cell.sites for name in names[site])
        found.append(replace(cell, sites=tuple(sites)))
    return found


def records_of(cells: Sequence[Cell]) -> list[Record]:
    """One recording for each site of the cells, of the steps and branches that some cell needs."""
    steps: dict[str, set[int] | None] = {}
    branches: dict[str, set[str] | None] = {}
    for cell in cells:
        window = None if cell.window is None else set(cell.window)
        named = cell.branch if isinstance(cell.branch, tuple) else (cell.branch,)
        wanted = None if cell.branch is None else {str(each) for each in named}
        for site in cell.sites:
            steps[site] = _union(steps.get(site, set()), window)
            branches[site] = _union(branches.get(site, set()), wanted)
    return [Record(site, steps=steps[site], branch=_order(branches[site])) for site in steps]


def _union(seen: set[Any] | None, more: set[Any] | None) -> set[Any] | None:
    return None if seen is None or more is None else seen | more


def _order(names: set[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(sorted(names))


def check_pairs(
    reader: "Reader",
    clean: Any,
    corrupted: Any,
    cells: Sequence[Cell] = (),
    direction: str = "restore",
) -> None:
    """Refuse prompts that are no pairs, and tokens of a language model without a counterpart.

    Token i of the prompt that gives goes to token i of the one that takes. Where a cell names its
    tokens, the run tells whether each of them is there.
    """
    sides = [[each] if isinstance(each, str) else list(each) for each in (clean, corrupted)]
    if len(sides[0]) != len(sides[1]):
        raise InvalidInput(
            f"pairs: {len(sides[0])} clean prompts and {len(sides[1])} corrupted ones; each clean "
            "prompt needs its corrupted one"
        )
    if reader.kind != "language" or reader.tokenizer is None:
        return
    if all(cell.tokens is not None for cell in cells):
        return
    names = ["clean", "corrupted"]
    if direction == "corrupt":
        names, sides = names[::-1], sides[::-1]
    for number, (gives, takes) in enumerate(zip(*sides, strict=True)):
        has, wants = map(len, tokenize(reader, [gives, takes])[0])
        if has < wants:
            which = f"token {has}" if wants == has + 1 else f"tokens {has} .. {wants - 1}"
            raise InvalidInput(
                f"pair {number}: {which} of the {names[1]} prompt {takes!r} would take the values "
                f"of the same of the {names[0]} prompt {gives!r}, which has {has} tokens; give "
                "cells of tokens that both have, or prompts with as many"
            )


def _repeat_arguments(arguments: Mapping[str, Any], count: int, repeats: int) -> dict[str, Any]:
    """Arguments with one entry for each row, repeated with the rows."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == count > 1:
            value = torch.cat([value] * repeats)
        elif isinstance(value, list | tuple) and len(value) == count > 1 and _per_row(name):
            value = list(value) * repeats
        found[name] = value
    return found


def _per_row(name: str) -> bool:
    return "prompt" in name or "image" in name


def _values(given: Any, count: int) -> Values:
    """What a metric gave, as [rows]."""
    if isinstance(given, Tensor):
        given = given.detach().float().cpu().numpy()
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"metric: numbers are needed, got {type(given).__name__}") from error
    if found.shape != (count,):
        raise InvalidInput(
            f"metric: one number for each of {count} rows is needed, got {list(found.shape)}"
        )
    endless = [value for value in found if math.isinf(value)]
    if endless:
        raise InvalidInput(f"metric: {len(endless)} of {count} values are infinite")
    return found
