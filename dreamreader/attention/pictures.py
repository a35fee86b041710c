"""Heat maps as pictures, and the table of them in a notebook."""

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from dreamreader.attention.maps import WordMaps

_ROWS, _WORDS = 8, 12
_CELL = "padding:2px 6px;text-align:center;font-size:90%"


def coloured(heat: Float[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """The colours of a map, dark at 0 and light at its maximum."""
    from matplotlib import colormaps

    share = heat / heat.amax().clamp(min=1e-12)
    return torch.from_numpy(colormaps["inferno"](share.numpy())[..., :3]).float()


def overlay(image: Any, heat: Float[Tensor, "h w"], strength: float) -> Any:
    """A picture with a map over it: the more attention, the more of the map's colour."""
    from PIL import Image

    from dreamreader.attention.maps import resized
    from dreamreader.report.blocks import to_pil

    picture = to_pil(image).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(picture.height, picture.width, 3) / 255
    heat = resized(heat.float(), (picture.height, picture.width))
    share = (strength * heat / heat.amax().clamp(min=1e-12))[..., None]
    mixed = pixels * (1 - share) + coloured(heat) * share
    return Image.fromarray((mixed * 255).round().byte().numpy())


def table(found: "WordMaps") -> str:
    """Rows by words; with the pictures of the run below the maps where there are some."""
    lines = []
    for number, row in enumerate(found.rows[:_ROWS]):
        words = found.words[number][:_WORDS]
        if found.images is not None:
            pictures = [
                overlay(found.images[number], found._flat()[number, n], 0.7)
                for n in range(len(words))
            ]
        else:
            pictures = [_plain(found._flat()[number, n]) for n in range(len(words))]
        cells = "".join(
            f'<td style="{_CELL}"><img alt="attention to {escape(word)}" width="96" '
            f'src="{_source(picture)}"><br>{escape(word)}</td>'
            for word, picture in zip(words, pictures, strict=True)
        )
        head = f"{row.index}: {row.prompt or ''} (seed {row.seed})"
        lines.append(f'<tr><th style="{_CELL}">{escape(head)}</th>{cells}</tr>')
    text = f"attention to words, {found.size[0]} x {found.size[1]}, {len(found.sites)} sites"
    if len(found.rows) > _ROWS or any(len(each) > _WORDS for each in found.words):
        text += f"; the first {_ROWS} rows and {_WORDS} words are shown"
    return f"<table><caption>{escape(text)}</caption>{''.join(lines)}</table>"


def _plain(heat: Float[Tensor, "h w"]) -> Any:
    from PIL import Image

    picture = Image.fromarray((coloured(heat) * 255).round().byte().numpy())
    return picture.resize((96, 96 * heat.shape[0] // heat.shape[1]), Image.Resampling.BICUBIC)


def _source(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
