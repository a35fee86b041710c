"""What a finished run found: its rows by condition, and means and pictures of them."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import yaml

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.methods import ExperimentSpec
from dreamreader.stats import Interval, bootstrap, wilson
from dreamreader.sweep import Cell

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The rows of a complete run folder.

    Attributes:
        folder: where they are. spec: of the run.
        rows: all of them, as mappings from column to value.
        metrics: columns that metrics, or the method, measured.

    Example:
        >>> from dreamreader.experiments import load_results
        >>> results = load_results("runs/red-to-blue")
        >>> tint = results.mean("patched", "tint")
    """

    folder: RunFolder
    spec: ExperimentSpec
    rows: Sequence[Found]
    metrics: Sequence[str]

    # The earlier name of `load_results`, which stands above this module and sets it.
    of_folder: ClassVar[Callable[[str | os.PathLike[str]], "Results"]]

    @cached_property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(row["condition"] for row in self.rows))

    def of(self, condition: str, **where: Any) -> list[Found]:
        """Rows of a condition whose columns have these values."""
        return [
            row
            for row in self.rows
            if row["condition"] == condition and all(row.get(k) == v for k, v in where.items())
        ]

    @property
    def numbers(self) -> list[str]:
        """Metrics that are numbers or truth values."""
        kinds = bool | int | float
        return [
            name
            for name in self.metrics
            if all(row.get(name) is None or isinstance(row[name], kinds) for row in self.rows)
            and any(row.get(name) is not None for row in self.rows)
        ]

    def where(self, **columns: Any) -> "Results":
        """Only the rows whose columns have these values."""
        kept = [r for r in self.rows if all(r.get(k) == v for k, v in columns.items())]
        return replace(self, rows=kept)

    def effect_column(self, name: str | None, changed: str, base: str) -> str:
        """The column an effect is formed of: the one named, else the first number that differs.

        Args:
            changed, base: conditions between which it must differ.

        Raises:
            UnknownName: there is no such number.
            InvalidInput: nothing was measured.
        """
        if name is not None:
            if name not in self.numbers:
                raise UnknownName("metric", name, self.numbers, "It must be a number of the rows.")
            return name
        if not self.numbers:
            raise InvalidInput("the spec has no metric that gives numbers: effects need one")
        differing = [n for n in self.numbers if self._mean(changed, n) != self._mean(base, n)]
        return (differing or self.numbers)[0]

    def _mean(self, condition: str, name: str) -> float | None:
        found = [float(r[name]) for r in self.of(condition) if r.get(name) is not None]
        return sum(found) / len(found) if found else None

    def cell(self, row: Found) -> Cell:
        """The cell of a row, as it was."""
        return Cell.from_dict(yaml.safe_load(row["cell_json"]))

    def mean(self, condition: str, name: str, **where: Any) -> Interval:
        """Mean of a column with its 95 % interval: Wilson's for truth values, else bootstrap."""
        return mean_interval([row.get(name) for row in self.of(condition, **where)])

    def image(self, row: Found, kind: str = "images") -> Any:
        """The picture (or map) of a row; None where it was not kept.

        Raises:
            InvalidInput: its file is damaged.
        """
        from PIL import Image

        file = self.folder.image_file(row["row"], kind)
        if not file.is_file():
            return None
        try:
            with Image.open(file) as image:
                image.load()
        except OSError as error:
            raise InvalidInput(f"{file} is damaged ({error}); delete it") from error
        return image

    def axis_lines(self, axis: str, condition: str) -> list[str]:
        """The metrics at every value of an axis, a line each."""
        lines = []
        for value in axis_values(self.of(condition), axis):
            found = {n: self.mean(condition, n, **{axis: value}) for n in self.numbers[:6]}
            shown = ", ".join(f"{name} {format_interval(each)}" for name, each in found.items())
            lines.append(f"  {axis} {value}: {shown}")
        return lines


def mean_interval(values: Iterable[Any]) -> Interval:
    """Mean with its 95 % interval; missing and NaN values are left out."""
    known = [v for v in values if v is not None and not (isinstance(v, float) and math.isnan(v))]
    if not known:
        return Interval(math.nan, math.nan, math.nan, 0)
    if all(isinstance(value, bool) for value in known):
        return wilson([bool(value) for value in known])
    return bootstrap([float(value) for value in known], resamples=1000)


def format_interval(found: Interval) -> str:
    """An interval in short: `0.42 (0.30 to 0.55)`."""
    if not found.n:
        return "–"
    return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"


def axis_values(rows: Sequence[Found], axis: str) -> list[Any]:
    return sorted({row[axis] for row in rows if row.get(axis) is not None})
