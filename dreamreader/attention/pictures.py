"""Heat maps as pictures, and the table of them in a notebook."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.attention.scores import resize

_CELL = "padding:2px 6px;text-align:center;font-size:90%"


def apply_colours(heat: Float[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """The colours of a map, from black at 0 over purple and orange to white at its maximum.

    Formula: l + a (cos p v + sin p w), where the lightness l is the share of the maximum,
        a = 0.7 l (1 - l), p = 2 pi (0.1 + l / 3).

    Reference:
        Green, A colour scheme for the display of astronomical intensity images (2011).
    """
    light = (heat / heat.amax().clamp(min=1e-12))[..., None].double()
    angle = 2 * math.pi * (0.1 + light / 3)
    across = angle.cos() * light.new_tensor([-0.14861, -0.29227, 1.97294])
    along = angle.sin() * light.new_tensor([1.78277, -0.90649, 0.0])
    return (light + 0.7 * light * (1 - light) * (across + along)).clamp(0, 1).float()


def overlay(image: Any, heat: Float[Tensor, "h w"], strength: float) -> Any:
    """A picture with a map over it: the more attention, the more of the map's colour."""
    from PIL import Image

    from dreamreader.report.blocks import to_pil

    picture = to_pil(image).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(picture.height, picture.width, 3) / 255
    heat = resize(heat.float(), (picture.height, picture.width))
    share = (strength * heat / heat.amax().clamp(min=1e-12))[..., None]
    mixed = pixels * (1 - share) + apply_colours(heat) * share
    return Image.fromarray((mixed * 255).round().byte().numpy())


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
