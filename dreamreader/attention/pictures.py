"""Heat maps as pictures, and the table of them in a notebook."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dreamreader.report.heat import apply_colours, overlay

_CELL = "padding:2px 6px;text-align:center;font-size:90%"


def draw(heat: Float[Tensor, "h w"], image: Any = None) -> Any:
    """A map over its picture, or alone where there is none, 96 pixels wide."""
    from PIL import Image

    if image is not None:
        return overlay(image, heat, 0.7)
    drawn = Image.fromarray((apply_colours(heat) * 255).round().byte().numpy())
    return drawn.resize((96, 96 * heat.shape[0] // heat.shape[1]), Image.Resampling.BICUBIC)


def table(title: str, lines: Sequence[tuple[str, Sequence[tuple[str, Any]]]]) -> str:
    """Rows by words: a line for each row, with a picture for each of its words."""
    parts = []
    for head, pictures in lines:
        cells = "".join(
            f'<td style="{_CELL}"><img alt="attention to {escape(word)}" width="96" '
            f'src="{_source(picture)}"><br>{escape(word)}</td>'
            for word, picture in pictures
        )
        parts.append(f'<tr><th style="{_CELL}">{escape(head)}</th>{cells}</tr>')
    return f"<table><caption>{escape(title)}</caption>{''.join(parts)}</table>"


def _source(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
