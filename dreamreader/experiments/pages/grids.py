"""From the rows of a localisation run to a `Grid`, and its part of the report."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dreamreader.engine import Row as EngineRow
from dreamreader.errors import InvalidInput
from dreamreader.experiments.results import Results
from dreamreader.report import Folded, Number, Section, Table
from dreamreader.sweep import Cell, Grid


def grid_of(
    results: Results,
    condition: str,
    effect: str | None,
    base: str,
    goal: str | None,
    floor: float | None = None,
) -> Grid:
    """The grid of one condition.

    Args:
        condition: whose rows have cells.
        effect: column that is compared; the first number that varies where None.
        base: condition without a change. goal: condition at the other end of the way, or None.
        floor: value at the other end, instead of a condition.
    """
    column = results.effect_column(effect, goal or condition, base)
    rows = results.of(condition)
    cells: dict[str, Cell] = {}
    for row in rows:
        cells.setdefault(row["cell"], results.cell(row))
    keys = [(row["item"], row["seed"]) for row in results.of(base)]
    place = {key: n for n, key in enumerate(keys)}
    labels = {label: n for n, label in enumerate(cells)}
    values = np.full((len(cells), len(keys)), np.nan)
    for row in rows:
        values[labels[row["cell"]], place[row["item"], row["seed"]]] = _number(row[column])
    start = np.array([_number(row[column]) for row in results.of(base)])
    end = None
    if goal is not None:
        found = {(row["item"], row["seed"]): _number(row[column]) for row in results.of(goal)}
        end = np.array([found[key] for key in keys])
    elif floor is not None:
        end = np.full(len(keys), floor)
    described = tuple(
        EngineRow(n, row["prompt"], row["seed"]) for n, row in enumerate(results.of(base))
    )
    return Grid(tuple(cells.values()), described, values, start, end, condition)


def grid_summary(grid: Grid, count: int = 5) -> list[str]:
    """The largest effects, a line each."""
    best = sorted(
        zip(grid.cells, grid.effects, grid.q_values, strict=True),
        key=lambda each: -np.nan_to_num(abs(each[1].value)),
    )
    shown = "{:.2f} ({:.2f} to {:.2f})"
    halves = by_seeds(grid)
    agreed = [] if halves is None else [halves[0].agreement(halves[1])]
    return [f"  two sets of seeds: Spearman {a.spearman:.2f} over {a.n} cells" for a in agreed] + [
        f"  {shown.format(e.value, e.low, e.high)}  q = {q:.2g}  {cell.label}"
        for cell, e, q in best[:count]
    ]


def grid_numbers(grid: Grid, control: Grid | None, column: str) -> list[Number]:
    """The largest effect beside that of the control, and how far the seeds agree."""
    best = largest(grid)
    effect = grid.effect(best)
    found = [_number_of(effect, f"largest effect on {column.replace('_', ' ')}", best.label, grid)]
    if control is not None:
        other = control.effect(largest(control))
        found.append(_number_of(other, "largest effect of the control", "", control))
    halves = by_seeds(grid)
    if halves is not None:
        agreed = halves[0].agreement(halves[1])
        note = f"Spearman over {agreed.n} cells; Kendall {agreed.kendall:.2f}"
        found.append(Number(f"{agreed.spearman:.2f}", "agreement of two sets of seeds", note))
    return found


def _number_of(effect: Any, label: str, note: str, grid: Grid) -> Number:
    value = f"{100 * effect.value:.0f} %" if grid.goal is not None else f"{effect.value:.3g}"
    bounds = f"{effect.low:.2f} to {effect.high:.2f}"
    return Number(value, label, f"{note} ({bounds})" if note else bounds)


def largest(grid: Grid) -> Cell:
    """The cell with the largest effect, whatever its sign."""
    sizes = [np.nan_to_num(abs(each.value), nan=-1.0) for each in grid.effects]
    return grid.cells[int(np.argmax(sizes))]


def by_seeds(grid: Grid) -> tuple[Grid, Grid] | None:
    """The grids of the first and of the second half of the seeds; None where there is one seed, or
    nothing to compare."""
    seeds = sorted({row.seed for row in grid.rows if row.seed is not None})
    if len(seeds) < 2 or len(grid.cells) < 2:
        return None
    first = set(seeds[: len(seeds) // 2])
    halves = []
    for wanted in (True, False):
        kept = [n for n, row in enumerate(grid.rows) if (row.seed in first) == wanted]
        rows = tuple(grid.rows[n] for n in kept)
        goal = None if grid.goal is None else grid.goal[kept]
        halves.append(
            replace(grid, rows=rows, values=grid.values[:, kept], base=grid.base[kept], goal=goal)
        )
    values = np.array([[each.value for each in half.effects] for half in halves])
    values = values[:, np.isfinite(values).all(0)]
    varies = values.shape[1] > 1 and bool((np.ptp(values, axis=1) > 0).all())
    return (halves[0], halves[1]) if varies else None


def reproduction(grid: Grid) -> list[Section]:
    """How far two halves of the seeds give the same order of cells."""
    halves = by_seeds(grid)
    if halves is None:
        return []
    agreed = halves[0].agreement(halves[1])
    tops = [[cell.label for cell in half.top(5)] for half in halves]
    shared = len(set(tops[0]) & set(tops[1]))
    count = min(map(len, tops))
    lead = (
        f"Rank correlation of the effects over {agreed.n} cells: Spearman {agreed.spearman:.2f}, "
        f"Kendall {agreed.kendall:.2f}. {shared} of the {count} largest are the same."
    )
    table = Table(("first half of the seeds", "second half"), list(zip(*tops, strict=True)))
    return [Section("Reproduction with other seeds", [table], lead)]


def grid_sections(grids: Mapping[str, Grid], column: str) -> list[Section]:
    """Heat map and table of each grid of effects on a column."""
    found = []
    for name, grid in grids.items():
        table = Table(
            ("cell", "effect", "95 % interval", "rows", "p", "q"),
            [
                (
                    each["label"],
                    f"{each['effect']:.3f}",
                    f"{each['low']:.3f} to {each['high']:.3f}",
                    each["n"],
                    f"{each['p']:.2g}",
                    f"{each['q']:.2g}",
                )
                for each in sorted(grid.as_rows(), key=lambda each: -np.nan_to_num(each["effect"]))
            ],
            caption="q: p corrected for the number of cells by Benjamini and Hochberg.",
        )
        unit = "percent of the way" if grid.goal is not None else "difference"
        title = f"Effect on {column}, {unit}: {name}"
        found.append(
            Section(
                f"Effects, {name}",
                [grid.heat_map(title), Folded("All cells", [table])],
                _lead(grid),
            )
        )
    return found


def _lead(grid: Grid) -> str:
    if grid.goal is None:
        return "Mean change of the metric against the unedited rows of the same prompts and seeds."
    return (
        "Share of the way from the rows without a change (0) to the other end (1), a ratio of "
        "means over rows."
    )


def _number(value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, bool | int | float):
        return float(value)
    raise InvalidInput(f"an effect needs numbers or truth values, got {value!r}")
