"""From the cell of each row to the edits that change every row at its own cell, in one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dreamreader.edits import Ablate, Patch
from dreamreader.engine import Activation, Cache
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sweep.cells import Cell

KINDS = ("zero", "mean", "resample", "project")
Rows = Sequence[Cell | None]
Source = Cache | Mapping[str, Tensor]


def patch_edits(
    cells_of_rows: Rows, source: Source, from_rows: int | Sequence[int] | None = None
) -> list[Patch]:
    """Gives the edits that put the source's values into each row at the row's cell.

    One edit for each distinct cell, with strength 1 in the rows of this cell and 0 elsewhere: a
    row without a cell is computed as if there were no edits. Restoring takes the cache of the clean
    run and rows with the corrupted prompts, corrupting the other way round.

    Args:
        cells_of_rows: for each row of the run its cell; None, or a cell without sites, for none.
        source: a cache with the sites, steps and branches of the cells, or {site: tensor} that
            holds for all steps: [features], [tokens, features] or [rows, tokens, features].
        from_rows: for each row the row of the source that it takes; row i takes row i by default.

    Raises:
        InvalidInput: there are no rows, or the source lacks a site.

    Example:
        >>> import torch
        >>> cells = [None, Cell("0", "0"), Cell("1", "1")]
        >>> edits = patch_edits(cells, {"0": torch.zeros(2), "1": torch.zeros(2)})
        >>> [(edit.sites, edit.strength) for edit in edits]
        [(('0',), [0.0, 1.0, 0.0]), (('1',), [0.0, 0.0, 1.0])]
    """
    found = []
    for cell, strength in one_hot(cells_of_rows).items():
        found.append(
            Patch(
                cell.sites,
                _of_cell(source, cell, "patch_edits"),
                strength=strength,
                from_rows=_each_row(from_rows),
                **cell.selection,
            )
        )
    return found


def ablate_edits(
    cells_of_rows: Rows,
    kind: str = "zero",
    source: Cache | None = None,
    from_rows: int | Sequence[int] | None = None,
    direction: Tensor | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    one_sided: bool = False,
) -> list[Ablate]:
    """Gives the edits that ablate each row at its cell; the other arguments are those of `Ablate`.

    Args:
        cells_of_rows: for each row of the run its cell; None, or a cell without sites, for none.
        kind: `zero`, `mean`, `resample` or `project`. Noise is left out: it would be drawn by the
            place of a row in the batch.
        source: a cache with the sites, steps and branches of the cells, for mean and resample.
        from_rows: resample: row of the source for each row; drawn from `seed` by default.

    Raises:
        UnknownName: there is no such kind.
        InvalidInput: the kind lacks what it needs, or the source lacks a site.
    """
    if kind not in KINDS:
        raise UnknownName("kind of ablation in a sweep", kind, KINDS)
    found = []
    for cell, strength in one_hot(cells_of_rows).items():
        found.append(
            Ablate(
                cell.sites,
                kind,
                source=None if source is None else _of_cell(source, cell, "ablate_edits"),
                from_rows=_each_row(from_rows),
                direction=direction,
                seed=seed,
                one_sided=one_sided,
                strength=strength,
                **cell.selection,
            )
        )
    return found


def one_hot(cells_of_rows: Rows) -> dict[Cell, list[float]]:
    """{cell: 1 in its rows, 0 elsewhere}, cells in the order of their first row.

    Cells that differ in name or note only are one.

    Raises:
        InvalidInput: there are no rows, or one is no cell.
    """
    rows = list(cells_of_rows)
    if not rows:
        raise InvalidInput("cells_of_rows is empty: one cell for each row of the run is needed")
    found: dict[Cell, list[float]] = {}
    first: dict[Any, Cell] = {}
    for number, cell in enumerate(rows):
        if cell is not None and not isinstance(cell, Cell):
            raise InvalidInput(f"row {number}: a Cell or None expected, got {type(cell).__name__}")
        if cell is None or not cell.sites:
            continue
        key = (cell.sites, cell.steps, cell.branch, cell.tokens, cell.heads)
        found.setdefault(first.setdefault(key, cell), [0.0] * len(rows))[number] = 1.0
    return found


def _each_row(from_rows: int | Sequence[int] | None) -> int | list[int] | None:
    return from_rows if from_rows is None or isinstance(from_rows, int) else list(from_rows)


def _of_cell(source: Source, cell: Cell, label: str) -> Any:
    """The part of the source that a cell needs: an edit reads all it holds to check it."""
    for site in cell.sites:
        if site not in source:
            has = ", ".join(list(source)[:5]) or "nothing"
            raise InvalidInput(
                f"{label}: the source has no values of {site}, which the cell {cell.name!r} "
                f"changes; it has {has}"
            )
    if not isinstance(source, Cache):
        return {site: source[site] for site in cell.sites}
    return Cache([_in_window(source[site], cell, label) for site in cell.sites])


def _in_window(found: Activation, cell: Cell, label: str) -> Activation:
    """A view of the steps of the cell's window, which lie side by side."""
    if cell.steps is None:
        return found
    start, stop = cell.steps
    kept = [n for n, each in enumerate(found.steps) if start <= each.step < stop]
    if not kept:
        had = ", ".join(str(each.step) for each in found.steps)
        raise InvalidInput(
            f"{label}: the source has no step of {cell.label!r} at {found.site}; it has {had}"
        )
    steps = found.steps[kept[0] : kept[-1] + 1]
    tensor = found.tensor.narrow(found.axes.index("steps"), kept[0], len(steps))
    own = found.positions
    positions = None if own is None else own.narrow(1, kept[0], len(steps))
    return replace(found, tensor=tensor, steps=steps, positions=positions)
