"""What a sweep over cells gave: effects with intervals, p-values, tables and heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamreader.artifacts import Artifact
from dreamreader.engine import Row
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.stats import (
    Interval,
    benjamini_hochberg,
    holm,
    kendall,
    ratio_of_means,
    sign_flip,
    spearman,
)
from dreamreader.sweep.cells import Cell

if TYPE_CHECKING:
    from dreamreader.report import HeatMap

Values = NDArray[np.float64]
CORRECTIONS = {"benjamini_hochberg": benjamini_hochberg, "holm": holm}


@dataclass(frozen=True)
class Agreement:
    """Whether two grids order the same cells alike: rank correlations over `n` cells."""

    spearman: float
    kendall: float
    n: int


@dataclass(frozen=True, eq=False)
class Grid(Artifact, kind="grid"):
    """One metric value for each cell and row, and what follows from them.

    Formula: effect = mean over rows of (M_cell - M_base) / mean of (M_goal - M_base), a ratio of
        means; without a goal the mean of M_cell - M_base. 0 is no effect, 1 the whole way.

    Rows in which a metric is NaN (nothing to measure in the picture) are left out of that cell's
    effect; `Interval.n` counts those that are in.

    Attributes:
        cells: in the order of the first axis of `values`.
        rows: prompt and seed of each row of the base run; `index` is the number of the pair.
        values: [cells, rows] metric of the changed runs.
        base: [rows] metric without a change: corrupted prompts where cells are restored.
        goal: [rows] metric of the run that gives the values, or the floor of an ablation; None for
            plain differences.
        kind: what was done: `restore`, `corrupt` or the kind of ablation.
        confidence: of the intervals.
    """

    cells: tuple[Cell, ...]
    rows: tuple[Row, ...]
    values: Values
    base: Values
    goal: Values | None
    kind: str
    confidence: float = 0.95

    def __post_init__(self):
        shape = (len(self.cells), len(self.rows))
        sides = [self.base] if self.goal is None else [self.base, self.goal]
        if self.values.shape != shape or any(each.shape != shape[1:] for each in sides):
            raise InvalidInput(
                f"Grid: {shape[0]} cells and {shape[1]} rows, values are "
                f"{list(self.values.shape)}, base and goal {[list(s.shape) for s in sides]}"
            )

    def __eq__(self, other: object) -> bool:
        """Whether all is the same; NaN equals NaN."""
        if not isinstance(other, Grid):
            return NotImplemented
        return all(_same(getattr(self, e.name), getattr(other, e.name)) for e in fields(self))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of its cells."""
        return tuple(dict.fromkeys(site for cell in self.cells for site in cell.sites))

    @cached_property
    def effects(self) -> list[Interval]:
        """Effect of each cell with its bootstrap interval; NaN where nothing is measured."""
        nan = float("nan")
        found = [Interval(nan, nan, nan, 0)] * len(self.cells)
        for cells, rows in self._cells_by_rows():
            moved = self.values[cells][:, rows] - self.base[rows]
            whole = None if self.goal is None else self.goal[rows] - self.base[rows]
            effects = ratio_of_means(moved, whole, confidence=self.confidence)
            for cell, effect in zip(cells, effects, strict=True):
                found[cell] = effect
        return found

    @cached_property
    def p_values(self) -> Values:
        """[cells] two-sided p-value of M_cell - M_base by sign flips; see `stats.sign_flip`."""
        found = np.full(len(self.cells), np.nan)
        for cells, rows in self._cells_by_rows():
            found[cells] = sign_flip(self.values[cells][:, rows] - self.base[rows])
        return found

    @property
    def q_values(self) -> Values:
        """[cells] p-values corrected for the number of cells, by Benjamini and Hochberg."""
        return self.corrected()

    def corrected(self, method: str = "benjamini_hochberg") -> Values:
        """p-values corrected for the number of cells: `benjamini_hochberg` or `holm`."""
        if method not in CORRECTIONS:
            raise UnknownName("correction", method, CORRECTIONS)
        return CORRECTIONS[method](self.p_values)

    def effect(self, cell: Cell) -> Interval:
        """The effect of one cell.

        Raises:
            UnknownName: the grid has no such cell.
        """
        if cell not in self.cells:
            raise UnknownName("cell", cell.label, [each.label for each in self.cells])
        return self.effects[self.cells.index(cell)]

    def top(self, n: int = 5) -> list[Cell]:
        """The n cells with the largest effect, the largest first; cells without one come last.

        Raises:
            InvalidInput: n is no number from 0.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise InvalidInput(f"top: n must be an integer of at least 0, got {n!r}")
        values = [each.value for each in self.effects]
        order = sorted(
            range(len(values)), key=lambda i: (np.isnan(values[i]), -np.nan_to_num(values[i]))
        )
        return [self.cells[i] for i in order[:n]]

    def agreement(self, other: "Grid") -> Agreement:
        """Rank correlation of the effects with another grid of the same cells, such as other seeds.

        Raises:
            InvalidInput: the cells differ, or fewer than 2 have an effect in both.
        """
        if other.cells != self.cells:
            raise InvalidInput(
                f"agreement: both grids need the same cells, got {len(self.cells)} and "
                f"{len(other.cells)} of which {len(set(self.cells) & set(other.cells))} are shared"
            )
        pairs = [(a.value, b.value) for a, b in zip(self.effects, other.effects, strict=True)]
        known = np.array([pair for pair in pairs if np.isfinite(pair).all()])
        if len(known) < 2:
            raise InvalidInput(f"agreement: {len(known)} cells have an effect in both grids")
        a, b = known.T
        return Agreement(spearman(a, b), kendall(a, b), len(known))

    def as_rows(self) -> list[dict[str, Any]]:
        """One plain dict for each cell: what it is, its effect and bounds, p and q."""
        q_values = self.q_values
        return [
            {
                "label": cell.label,
                **cell.as_dict(),
                "kind": self.kind,
                "effect": effect.value,
                "low": effect.low,
                "high": effect.high,
                "n": effect.n,
                "p": float(p),
                "q": float(q),
            }
            for cell, effect, p, q in zip(
                self.cells, self.effects, self.p_values, q_values, strict=True
            )
        ]

    def heat_map(
        self, title: str = "", alpha: float = 0.05, rows: str = "place", columns: str = "time"
    ) -> "HeatMap":
        """Cells as a table, shaded by effect; those with q above `alpha` are bracketed.

        Args:
            title: of the map; what was done by default.
            alpha: bound of q.
            rows, columns: what the axes are: `place` and `time` of the cells, or coordinates of
                theirs, such as `source` and `target`.

        Raises:
            UnknownName: a cell has no such coordinate.
            InvalidInput: two cells lie at one place of the table.
        """
        from dreamreader.report import HeatMap

        sides = [[_along(cell, axis) for cell in self.cells] for axis in (rows, columns)]
        places, times = (list(dict.fromkeys(each)) for each in sides)
        values = np.full((len(places), len(times)), np.nan)
        notes = [[""] * len(times) for _ in places]
        doubtful = [[False] * len(times) for _ in places]
        taken: dict[tuple[int, int], Cell] = {}
        for place, time, cell, effect, q in zip(
            *sides, self.cells, self.effects, self.q_values, strict=True
        ):
            i, j = places.index(place), times.index(time)
            other = taken.setdefault((i, j), cell)
            if other is not cell:
                raise InvalidInput(
                    f"heat_map: {other.label!r} and {cell.label!r} have one {rows} and one "
                    f"{columns}; name axes that tell all cells apart"
                )
            values[i, j] = effect.value
            note = f" ({cell.note})" if cell.note else ""
            notes[i][j] = f"{effect.percent()}, q = {q:.2g}{note}" if effect.n else "not measured"
            doubtful[i][j] = not q <= alpha
        return HeatMap(
            title or f"Effect of {self.kind}, in percent",
            values,
            places,
            times,
            percent=self.goal is not None,
            limit=1.0 if self.goal is not None else float(np.nanmax(np.abs(values))) or 1.0,
            notes=notes,
            bracketed=doubtful,
            caption=f"In brackets: q above {alpha:g} over {len(self.cells)} cells.",
        )

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sides = {"values": self.values, "base": self.base, "goal": self.goal}
        tensors = {
            k: torch.tensor(v, dtype=torch.float64) for k, v in sides.items() if v is not None
        }
        content = {
            "cells": [cell.as_dict() for cell in self.cells],
            "rows": [asdict(row) for row in self.rows],
            "kind": self.kind,
            "confidence": self.confidence,
        }
        return tensors, content

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        goal = tensors.get("goal")
        return cls(
            tuple(Cell.from_dict(each) for each in content["cells"]),
            tuple(Row(**each) for each in content["rows"]),
            _float64(tensors["values"]),
            _float64(tensors["base"]),
            None if goal is None else _float64(goal),
            content["kind"],
            content["confidence"],
        )

    def _cells_by_rows(self) -> list[tuple[list[int], NDArray[np.int64]]]:
        """Cells that are measured in the same rows, and these rows."""
        sides = self.base if self.goal is None else self.base + self.goal
        known = np.isfinite(self.values) & np.isfinite(sides)
        groups: dict[bytes, list[int]] = {}
        for cell, mask in enumerate(known):
            if mask.any():
                groups.setdefault(mask.tobytes(), []).append(cell)
        return [(cells, np.flatnonzero(known[cells[0]])) for cells in groups.values()]

    def __repr__(self) -> str:
        best = self.top(3)
        shown = [f"{cell.label}: {self.effect(cell).value:.3g}" for cell in best]
        out = int((~np.isfinite(self.values + self.base)).any(0).sum())
        note = f", {out} rows not measured everywhere" if out else ""
        return (
            f"Grid of {len(self.cells)} cells x {len(self.rows)} rows ({self.kind}{note}); "
            f"largest effects: {'; '.join(shown)}"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    return bool(a == b) if type(a) is type(b) else False


def _float64(values: Tensor) -> Values:
    if values.dtype != torch.float64:
        raise InvalidInput(f"values of a grid are float64, got {values.dtype}")
    return values.numpy()


def _along(cell: Cell, axis: str) -> str:
    """Where a cell stands on an axis of a table, in words."""
    if axis in ("place", "time"):
        return getattr(cell, axis)
    found = cell.coordinate(axis)
    return "–".join(map(str, found)) if isinstance(found, tuple) else str(found)


def joined(grids: Sequence[Grid]) -> Grid:
    """One grid of the rows of several over the same cells, such as batches of pairs.

    Raises:
        InvalidInput: there are none, or cells or kinds differ.
    """
    if not grids:
        raise InvalidInput("joined: no grids")
    first = grids[0]
    for each in grids[1:]:
        same = each.cells == first.cells and each.kind == first.kind
        if not same or (each.goal is None) != (first.goal is None):
            raise InvalidInput("joined: the grids differ in cells, kind or goal")
    goals = [each.goal for each in grids if each.goal is not None]
    return Grid(
        first.cells,
        tuple(row for each in grids for row in each.rows),
        np.concatenate([each.values for each in grids], 1),
        np.concatenate([each.base for each in grids]),
        np.concatenate(goals) if goals else None,
        first.kind,
        first.confidence,
    )
