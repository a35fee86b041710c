"""Line charts as inline SVG: styled by the page's CSS, so that they follow light and dark."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from dreamreader.report.blocks import Curves, Series

# Units of the view box. Small on purpose: at the 350 px of a phone the text is still 11 px.
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 40
_DIGIT = 6.4  # width of a character of a label


def draw_curves(chart: Curves) -> Markup:
    """Draws a chart with confidence bands, dots with tooltips, and a sentence for screen readers.

    Args:
        chart: series whose values lie within `chart.y_range`; values outside are drawn at its edge.

    Returns:
        An `<svg>` element; every text in it is escaped.
    """
    ticks = chart.ticks
    low, high = (ticks[0], ticks[-1]) if ticks else (0.0, 1.0)
    widest = max(len(label) for _, label in _levels(chart))
    left = max(LEFT, math.ceil(_DIGIT * widest) + 9)
    area = _PlotArea(left, low, high if high > low else low + 1.0, *chart.y_range)
    parts = [_axes(chart, area, ticks)]
    # Bands first, so that no line disappears under the band of another.
    parts += [_band(line, area) for line in chart.series]
    parts += [_line(chart, line, area) for line in chart.series]
    said = "; ".join(
        f"{line.name}: "
        + ", ".join(f"{chart.shown(y)} at {x:g}" for x, y in zip(line.x, line.y, strict=True))
        for line in chart.series
    )
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title)}. {escape(said)}">{"".join(parts)}</svg>'
    )


class _PlotArea:
    """The map from values to places in the view box."""

    def __init__(self, left: int, x_low: float, x_high: float, y_low: float, y_high: float):
        self.left = left
        self.x_low, self.x_high, self.y_low, self.y_high = x_low, x_high, y_low, y_high

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(self.left + share * (WIDTH - self.left - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM), 1)

    def points(self, xs: Sequence[float], ys: Sequence[float]) -> list[str]:
        return [f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True)]


def _levels(chart: Curves) -> list[tuple[float, str]]:
    """Values of the grid lines with their labels."""
    low, high = chart.y_range
    values = [low + (high - low) * i / 4 for i in range(5)]
    return [(v, f"{100 * v:.0f}" if chart.percent else f"{v:.3g}") for v in values]


def _axes(chart: Curves, area: _PlotArea, ticks: Sequence[float]) -> str:
    left, parts = area.left, []
    for value, shown in _levels(chart):
        y = area.y(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4}" text-anchor="end">{shown}</text>')
    last = -1e9
    for value in ticks:
        x = area.x(value)
        if x - last >= 24:  # skip labels that would touch
            parts.append(
                f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
            )
            last = x
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    return "".join(parts)


def _band(line: Series, area: _PlotArea) -> str:
    if line.low is None or line.high is None:
        return ""
    there = area.points(line.x, line.high)
    back = area.points(line.x, line.low)[::-1]
    return f'<polygon class="band tone{line.tone}" points="{" ".join(there + back)}"/>'


def _line(chart: Curves, line: Series, area: _PlotArea) -> str:
    path = f'<polyline class="line" points="{" ".join(area.points(line.x, line.y))}"/>'
    dots = "".join(
        f'<circle class="dot" cx="{area.x(x)}" cy="{area.y(y)}" r="3">'
        f"<title>{escape(line.name)}: {chart.shown(y)} at {x:g}</title></circle>"
        for x, y in zip(line.x, line.y, strict=True)
    )
    return f'<g class="tone{line.tone}">{path}{dots}</g>'
