"""The parts of a report, as values; `templates/blocks.html` has a macro for each `kind`."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import ArrayLike
from PIL import Image

from dreamreader.errors import InvalidInput


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    body: str
    kind = "text"


@dataclass(frozen=True)
class Code:
    """Text as it is, in lines of equal letters: a file, a command."""

    body: str
    kind = "code"


@dataclass(frozen=True)
class Number:
    """One large number with what it means; `tone` is "good", "poor" or "" (no judgement)."""

    value: str
    label: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Numbers:
    """A row of large numbers."""

    items: Sequence[Number]
    kind = "numbers"


@dataclass(frozen=True)
class Picture:
    """A picture with the text that stands for it (`alt`); `mark` is a short sign drawn below it."""

    image: Image.Image | torch.Tensor
    alt: str
    mark: str = ""

    @property
    def source(self) -> Markup:
        """The picture as a data URI of a PNG."""
        buffer = io.BytesIO()
        to_pil(self.image).save(buffer, format="PNG", optimize=True)
        return Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())

    @property
    def size(self) -> tuple[int, int]:
        return to_pil(self.image).size


@dataclass(frozen=True)
class Gallery:
    """A grid of pictures: one labelled line per row, one heading per column (may be empty).

    `cell` is the width of a picture on the page, in pixels.
    """

    rows: Sequence[tuple[str, Sequence[Picture]]]
    columns: Sequence[str] = ()
    caption: str = ""
    cell: int = 84
    kind = "gallery"

    @property
    def labelled(self) -> bool:
        return any(label for label, _ in self.rows)

    def __post_init__(self):
        widths = {len(pictures) for _, pictures in self.rows}
        if len(widths) > 1:
            raise InvalidInput(f"Gallery: rows of different lengths {sorted(widths)}")
        if self.columns and widths and widths != {len(self.columns)}:
            raise InvalidInput(
                f"Gallery: {len(self.columns)} column headings for {widths.pop()} pictures a row"
            )


@dataclass(frozen=True)
class Series:
    """One line of a chart: values at x with a band; `tone` (1 to 5) picks colour and dashes."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    tone: int = 1

    def __post_init__(self):
        for name in ("y", "low", "high"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.x):
                raise InvalidInput(
                    f"Series {self.name!r}: {len(self.x)} x and {len(values)} {name}"
                )

    @classmethod
    def of_intervals(
        cls, name: str, points: Sequence[tuple[float, Any]], tone: int = 1
    ) -> "Series":
        """A line with its band from (x, interval) pairs, such as those of `dreamreader.stats`."""
        every = [each for _, each in points]
        return cls(
            name,
            [x for x, _ in points],
            [each.value for each in every],
            [each.low for each in every],
            [each.high for each in every],
            tone,
        )


@dataclass(frozen=True)
class Curves:
    """A line chart, values between `y_range`; with `percent` they are shown as percentages."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str = ""
    y_range: tuple[float, float] = (0.0, 1.0)
    percent: bool = True
    kind = "curves"

    def shown(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.percent else f"{value:.3g}"

    def cell(self, line: Series, x: float) -> str:
        """One series' value at x with its bounds, for the table below the chart."""
        if x not in line.x:
            return ""
        i = list(line.x).index(x)
        text = self.shown(line.y[i])
        if line.low is not None and line.high is not None:
            text += f" ({self.shown(line.low[i])} to {self.shown(line.high[i])})"
        return text

    @property
    def ticks(self) -> list[float]:
        """Every x that some series has, in order."""
        return sorted({x for line in self.series for x in line.x})


@dataclass(frozen=True)
class Charts:
    """Charts or heat maps side by side where there is room, else below each other."""

    items: Sequence["Curves | HeatMap"]
    kind = "charts"


@dataclass(frozen=True)
class HeatMap:
    """A table shaded by value: `values` is [rows, columns]; 0 is paper, `limit` full colour.

    Cells marked in `bracketed` are set in brackets; `notes` appear when a cell is pointed at.
    """

    title: str
    values: ArrayLike
    rows: Sequence[str]
    columns: Sequence[str]
    corner: str = ""
    limit: float = 1.0
    percent: bool = True
    notes: Sequence[Sequence[str]] | None = None
    bracketed: Sequence[Sequence[bool]] | None = None
    caption: str = ""
    kind = "heatmap"

    def __post_init__(self):
        shape = np.shape(self.values)
        if shape != (len(self.rows), len(self.columns)):
            raise InvalidInput(
                f"HeatMap {self.title!r}: values {list(shape)} for {len(self.rows)} rows and "
                f"{len(self.columns)} columns"
            )

    @property
    def lines(self) -> list[tuple[str, list[dict[str, object]]]]:
        values = np.asarray(self.values, dtype=float)
        return [
            (name, [self._cell(i, j, float(v)) for j, v in enumerate(values[i])])
            for i, name in enumerate(self.rows)
        ]

    def _text(self, value: float) -> str:
        if not np.isfinite(value):
            return "–"
        if self.percent:
            return str(round(100 * value))  # an int, so that no cell says -0
        return f"{value:.2g}"

    def _cell(self, row: int, column: int, value: float) -> dict[str, object]:
        share = min(1.0, abs(value) / self.limit) if np.isfinite(value) else 0.0
        text = self._text(value)
        if self.bracketed and self.bracketed[row][column]:
            text = f"({text})"
        note = self.notes[row][column] if self.notes else ""
        return {
            "text": text,
            "shade": round(100 * share),
            "side": "cold" if value < 0 else "warm",
            "strong": share > 0.62,
            "note": note,
        }


@dataclass(frozen=True)
class Tokens:
    """Texts whose pieces are shaded by value: 0 is paper, `limit` full colour, NaN is none.

    Args:
        texts: of each line its label, and pieces of text with their values.
        limit: the value of full colour.
    """

    texts: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    limit: float = 1.0
    caption: str = ""
    kind = "tokens"

    @property
    def lines(self) -> list[tuple[str, list[tuple[str, int, str]]]]:
        return [
            (label, [(text, self._shade(value), self._note(value)) for text, value in pieces])
            for label, pieces in self.texts
        ]

    def _shade(self, value: float) -> int:
        return round(100 * min(1.0, max(0.0, value / self.limit))) if np.isfinite(value) else 0

    def _note(self, value: float) -> str:
        return f"{value:.3g}" if np.isfinite(value) else ""


@dataclass(frozen=True)
class Table:
    """A plain table; columns whose cells are all numbers, shares or empty are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    kind = "table"

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InvalidInput(
                    f"Table: {len(row)} cells for {len(self.columns)} columns: {list(row)}"
                )

    @property
    def numeric(self) -> list[bool]:
        return [
            all(
                isinstance(row[i], (int, float)) or str(row[i])[:1] in "0123456789-–"
                for row in self.rows
            )
            for i in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Facts:
    """Names and values, one pair a line."""

    items: Sequence[tuple[str, object]]
    kind = "facts"


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: Sequence[object] = field(default_factory=tuple)
    kind = "folded"


def to_pil(image: Image.Image | torch.Tensor) -> Image.Image:
    """A picture as PIL; tensors are [3, h, w] or [h, w, 3] with values in [0, 1].

    Raises:
        InvalidInput: for a tensor of another shape.
    """
    if isinstance(image, Image.Image):
        return image
    pixels = image.detach().float().cpu()
    if pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = pixels.permute(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InvalidInput(f"a picture must be [3, h, w] or [h, w, 3], got {list(image.shape)}")
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
