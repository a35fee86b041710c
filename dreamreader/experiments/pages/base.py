"""What the page of a method has to say, and the parts that several of them are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from dreamreader.experiments.results import Results, axis_values, mean_interval
from dreamreader.report import Charts, Curves, Gallery, Number, Picture, Section, Series
from dreamreader.stats import Interval

COLUMNS = 8  # pictures in a line
TONES = 5


class MethodPage:
    """How the results of a method are read: base of the pages of all kinds.

    Args:
        results: of a complete run with this method.
    """

    def __init__(self, results: Results):
        self.results = results

    @property
    def method(self) -> Any:
        return self.results.spec.method

    def numbers(self) -> list[Number]:
        """What the report says first, in large."""
        return []

    def pictured_setting(self) -> Mapping[str, Any]:
        """Values of columns: of the changed rows, those that the report shows pictures of."""
        return {}

    def sections(self) -> list[Section]:
        """The method's part of the report."""
        return []

    def summary(self) -> list[str]:
        """The result in a few lines, for the terminal."""
        return []


def picture(results: Results, row: Mapping[str, Any], kind: str = "images") -> Picture | None:
    """The picture of a row for a gallery, with the colour that was read below it."""
    image = results.image(row, kind)
    if image is None:
        return None
    return Picture(image, f"{row['prompt']} (seed {row['seed']})", str(row.get("color") or ""))


def gallery(results: Results, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Gallery]:
    """A line of pictures for each set of rows that has them all, as long as the shortest."""
    shown = {
        name: [picture(results, row) for row in rows[:COLUMNS]] for name, rows in lines.items()
    }
    kept = [(name, pictures) for name, pictures in shown.items() if pictures and all(pictures)]
    if not kept:
        return []
    width = min(len(pictures) for _, pictures in kept)
    return [Gallery([(name, [each for each in line[:width] if each]) for name, line in kept])]


def axis_section(results: Results, axis: str, condition: str, title: str) -> Section:
    """Every metric over one axis as a curve, and a line of pictures for every value."""
    rows = results.of(condition)
    numeric = [value for value in axis_values(rows, axis) if isinstance(value, int | float)]
    charts = [curves(results, axis, {condition: rows})] if len(numeric) > 1 else []
    return Section(title, [*charts, *axis_gallery(results, axis, condition)])


def axis_gallery(results: Results, axis: str, condition: str) -> list[Gallery]:
    """A line of pictures for every value of an axis."""
    rows = results.of(condition)
    lines = {
        f"{axis} {value}": [row for row in rows if row.get(axis) == value]
        for value in axis_values(rows, axis)
    }
    return gallery(results, lines)


def curves(results: Results, axis: str, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Charts:
    """A chart for each of the first metrics, with a line for each set of rows."""
    return Charts([_curve(name, axis, lines) for name in results.numbers[:6]])


def _curve(name: str, axis: str, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Curves:
    series, every = [], []
    for number, (label, rows) in enumerate(lines.items()):
        ticks = [v for v in axis_values(rows, axis) if isinstance(v, int | float)]
        points = [mean_interval(r.get(name) for r in rows if r.get(axis) == x) for x in ticks]
        kept = [(x, point) for x, point in zip(ticks, points, strict=True) if point.n]
        every += [point for _, point in kept]
        series.append(Series.of_intervals(label.replace("_", " "), kept, number % TONES + 1))
    truth = all(isinstance(r.get(name), bool | None) for rows in lines.values() for r in rows)
    low = min([0.0, *(point.low for point in every)])
    high = max([1.0 if truth else 1e-9, *(point.high for point in every)])
    return Curves(name.replace("_", " "), series, axis, y_range=(low, high), percent=truth)


def interval_number(mean: Interval, label: str, where: str = "") -> Number:
    """A mean in large, its bounds below, after the name of a place, which stays as it is."""
    bounds = f"{mean.low:.2g} to {mean.high:.2g}"
    return Number(
        f"{mean.value:.3g}", label.replace("_", " "), f"{where}: {bounds}" if where else bounds
    )
