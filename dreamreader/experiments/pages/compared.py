"""Conditions of learned edits side by side, each at its best setting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dreamreader.experiments.pages.base import MethodPage, interval_number
from dreamreader.experiments.results import Found, Results, format_interval
from dreamreader.report import Number, Table
from dreamreader.stats import Interval

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


def best_setting(
    results: Results, column: str, names: Sequence[str], condition: str = "edited", **where: Any
) -> dict[str, Any]:
    """The setting with the largest mean of a column; the weaker one of equals, then the smaller.

    Rows without a value are left out of the means.

    Args:
        names: of the columns that are a setting. where: columns that are fixed.
    """
    found: dict[tuple[Any, ...], list[Found]] = {}
    for row in results.of(condition, **where):
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)

    def order(key: tuple[Any, ...]) -> tuple[float, float, float]:
        at = dict(zip(names, key, strict=True))
        values = [float(row[column]) for row in found[key] if row[column] is not None] or [np.nan]
        size = at.get("rank") or at.get("iterations") or 0
        return float(np.nan_to_num(np.mean(values), nan=-np.inf)), -abs(at["strength"]), -size

    return dict(zip(names, max(found, key=order), strict=True))


class ComparedPage(MethodPage):
    """Base of the pages of learned edits."""

    setting: ClassVar[Sequence[str]]  # columns that are chosen by the effect

    def lines(self) -> list[Line]:
        """What stands side by side."""
        raise NotImplementedError

    def best(self, condition: str = "edited", **where: Any) -> dict[str, Any]:
        """The setting with the largest mean of the effect."""
        return best_setting(self.results, self.effect, self.setting, condition, **where)

    @property
    def effect(self) -> str:
        """The column that settings are chosen by."""
        return self.results.effect_column(self.method.effect, "edited", "unedited")

    @property
    def columns(self) -> list[str]:
        """The first numbers, the effect before all others."""
        first = self.effect
        return [first, *(name for name in self.results.numbers if name != first)][:8]

    def pictured_setting(self) -> dict[str, Any]:
        return self.best()

    def summary(self) -> list[str]:
        told = []
        for line in self.lines():
            where = f" ({line.where})" if line.where else ""
            more = (name for name in line.columns if name.startswith("variation"))
            names = [*list(line.columns)[:FEW], *more]
            means = ", ".join(f"{name} {format_interval(line.columns[name])}" for name in names)
            told.append(f"  {line.label}{where}: {means}")
        return told

    def numbers(self) -> list[Number]:
        """The first column of the conditions that were edited."""
        found = []
        for line in self.lines():
            if line.condition not in STILL:
                name, value = next(iter(line.columns.items()))
                found.append(interval_number(value, f"{name}, {line.label}"))
        return found

    def table(self) -> Table:
        """Every condition at its best setting."""
        lines = self.lines()
        rows = [
            (line.label, line.where, *map(format_interval, line.columns.values())) for line in lines
        ]
        heads = ("condition", "setting", *lines[0].columns)
        return Table(heads, rows, "Means with 95 % intervals.")
