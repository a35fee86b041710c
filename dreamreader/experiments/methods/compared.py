"""Conditions of learned edits side by side, each at its best setting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader.experiments.results import Found, said
from dreamreader.report import Number, Table
from dreamreader.stats import Interval

if TYPE_CHECKING:
    from dreamreader.experiments.results import Results

STILL = ("unedited", "target_prompt")
FEW = 5  # columns in the terminal


@dataclass(frozen=True)
class Line:
    """A condition beside others.

    Attributes:
        label: its name. condition: its rows.
        setting: columns of its rows, such as cell and strength; {} where nothing is edited.
        columns: what was measured.
    """

    label: str
    condition: str
    setting: Mapping[str, Any]
    columns: Mapping[str, Interval]

    @property
    def where(self) -> str:
        """The setting in words."""
        known = {name: value for name, value in self.setting.items() if value is not None}
        parts = [f"rank {known['rank']}"] if known.get("rank") else []
        parts += [str(known["cell"])] if "cell" in known else []
        parts += [f"strength {known['strength']:g}"] if "strength" in known else []
        parts += [f"{known['iterations']} inner steps"] if "iterations" in known else []
        return ", ".join(parts)


def effect_of(method: Any, results: "Results") -> str:
    """The column that settings are chosen by."""
    return results.effect_column(method.effect, "edited", "unedited")


def columns_of(method: Any, results: "Results") -> list[str]:
    """The first numbers, the effect before all others."""
    first = effect_of(method, results)
    return [first, *(name for name in results.numbers if name != first)][:8]


def best(
    method: Any, results: "Results", names: Sequence[str], condition: str = "edited", **where: Any
) -> dict[str, Any]:
    """The setting with the largest mean of the effect; the weaker one of equals, then the smaller.

    Args:
        names: of the columns that are a setting. where: columns that are fixed.
    """
    column = effect_of(method, results)
    found: dict[tuple[Any, ...], list[Found]] = {}
    for row in results.of(condition, **where):
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)

    def order(key: tuple[Any, ...]) -> tuple[float, float, float]:
        at = dict(zip(names, key, strict=True))
        values = [np.nan if row[column] is None else float(row[column]) for row in found[key]]
        size = at.get("rank") or at.get("iterations") or 0
        return float(np.nan_to_num(np.mean(values), nan=-np.inf)), -abs(at["strength"]), -size

    return dict(zip(names, max(found, key=order), strict=True))


def summary(lines: Sequence[Line]) -> list[str]:
    """For the terminal."""
    told = []
    for line in lines:
        where = f" ({line.where})" if line.where else ""
        names = [*list(line.columns)[:FEW], *(n for n in line.columns if n.startswith("variation"))]
        found = ", ".join(f"{name} {said(line.columns[name])}" for name in names)
        told.append(f"  {line.label}{where}: {found}")
    return told


def numbers(lines: Sequence[Line]) -> list[Number]:
    """The first column of the conditions that were edited."""
    found = []
    for line in lines:
        if line.condition not in STILL:
            name, value = next(iter(line.columns.items()))
            text = f"{name.replace('_', ' ')}, {line.label}"
            found.append(Number(f"{value.value:.3g}", text, f"{value.low:.2g} to {value.high:.2g}"))
    return found


def table(lines: Sequence[Line]) -> Table:
    rows = [(line.label, line.where, *map(said, line.columns.values())) for line in lines]
    heads = ("condition", "setting", *lines[0].columns)
    return Table(heads, rows, "Means with 95 % intervals.")
