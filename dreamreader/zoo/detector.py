"""Reads the attributes of a scene back from its pixels, without a learned part.

Background: the commonest palette colour inside the frame zone. Objects: connected regions that differ from it.
Colour: vote of a region's inner pixels. Shape: best overlap with the five drawn shapes at the region's own size.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor

from dreamreader.zoo import scenes

MIN_AREA = 24  # pixels; smaller regions are specks
FOREGROUND = 0.20  # distance from the background colour, of sqrt(3) in all
MIN_OVERLAP = 0.6  # below it the shape is None
SMALL_BELOW = 20.0  # pixels, longer side of the bounding box
_EDGE = scenes.FRAME_PX + 1  # rows and columns that belong to the frame zone


@dataclass(frozen=True, eq=False)
class Found:
    """One region: attributes by the names of `scenes`, and its mask `[64, 64]`."""

    shape: str | None
    color: str
    size: str
    row: str
    column: str
    mask: Bool[Tensor, "h w"]

    @property
    def area(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class Reading:
    """What a picture shows; objects are in order of area, largest first."""

    background: str
    frame: bool
    objects: tuple[Found, ...]


def detect(images: Float[Tensor, "n 3 h w"] | list[Image.Image]) -> list[Reading]:
    """Reads background, frame and objects from pictures.

    Args:
        images: 64 x 64 pictures, values in [0, 1], or PIL pictures of that size.

    Returns:
        One reading per picture.

    Raises:
        ValueError: when the pictures are not 64 x 64 RGB.
    """
    pixels = images if isinstance(images, Tensor) else _to_tensor(images)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, scenes.SIZE_PX, scenes.SIZE_PX):
        raise ValueError(f"detect: expected pictures [n, 3, 64, 64], got {list(pixels.shape)}")
    pixels = pixels.detach().float().cpu()
    back = _nearest(pixels[:, :, _EDGE:-_EDGE, _EDGE:-_EDGE], scenes.BACKGROUNDS)
    names = list(scenes.BACKGROUNDS)
    counts = torch.stack([(back == i).flatten(1).sum(1) for i in range(len(names))], 1)
    chosen = counts.argmax(1)
    palette = _palette(scenes.BACKGROUNDS)[chosen]  # [n, 3]
    framed = _framed(pixels)
    distance = (pixels - palette[:, :, None, None]).norm(dim=1)
    mask = distance > FOREGROUND * 3**0.5
    zone = torch.zeros_like(mask)
    zone[:, _EDGE:-_EDGE, _EDGE:-_EDGE] = True
    mask &= zone | ~framed[:, None, None]
    labels = _components(mask)
    return [
        Reading(names[chosen[i]], bool(framed[i]), _objects(pixels[i], labels[i], distance[i]))
        for i in range(len(pixels))
    ]


def _objects(picture: Tensor, labels: Tensor, distance: Tensor) -> tuple[Found, ...]:
    found = []
    for label in labels[labels > 0].unique():
        mask = labels == label
        if int(mask.sum()) >= MIN_AREA:
            found.append(_read_object(picture, mask, distance))
    return tuple(sorted(found, key=lambda o: -o.area))


def _read_object(picture: Tensor, mask: Tensor, distance: Tensor) -> Found:
    ys, xs = (v.float() for v in mask.nonzero(as_tuple=True))
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    inner = mask & (distance >= distance[mask].median())
    votes = _nearest(picture[None, :, inner][..., None], scenes.COLORS).flatten()
    color = list(scenes.COLORS)[int(votes.bincount(minlength=len(scenes.COLORS)).argmax())]
    side = float(max(bottom - top, right - left))
    crop = mask[int(top) : int(bottom), int(left) : int(right)].float()
    return Found(
        shape=_shape(crop),
        color=color,
        size="small" if side < SMALL_BELOW else "large",
        row=_place(float(top + bottom) / 2, scenes.ROWS),
        column=_place(float(left + right) / 2, scenes.COLUMNS),
        mask=mask,
    )


def _shape(crop: Tensor) -> str | None:
    """The shape whose mask, stretched to the same bounding box, overlaps best (intersection over union)."""
    scaled = torch.nn.functional.interpolate(crop[None, None], size=(32, 32), mode="bilinear")[0, 0] > 0.5
    overlaps = {
        name: float((scaled & t).sum() / (scaled | t).sum().clamp(min=1)) for name, t in _templates().items()
    }
    best = max(overlaps, key=lambda name: overlaps[name])
    aspect = max(crop.shape) / max(1, min(crop.shape))
    return best if overlaps[best] >= MIN_OVERLAP and aspect < 1.6 else None


@functools.cache
def _templates() -> dict[str, Tensor]:
    out = {}
    for name in scenes.SHAPES:
        canvas = Image.new("L", (256, 256))
        scenes.draw_shape(ImageDraw.Draw(canvas), name, (32, 32), 28, 255)
        box = canvas.getbbox()
        small = canvas.crop(box).resize((32, 32), Image.Resampling.BOX)
        out[name] = torch.from_numpy(np.asarray(small).copy()) > 127
    return out


def _framed(pixels: Tensor) -> Tensor:
    border = torch.ones(scenes.SIZE_PX, scenes.SIZE_PX, dtype=torch.bool)
    width = scenes.FRAME_PX - 1  # the innermost ring is half mixed with the picture
    border[width:-width, width:-width] = False
    frame = torch.tensor(scenes.FRAME_COLOR) / 255
    near = (pixels - frame[None, :, None, None]).norm(dim=1) < 0.25
    return near[:, border].float().mean(1) > 0.6


def _components(mask: Tensor) -> Tensor:
    """Labels of 8-connected regions `[n, h, w]`, 0 outside: spreads the largest index until nothing changes."""
    n, h, w = mask.shape
    labels = (torch.arange(h * w).view(1, h, w) + 1).expand(n, h, w) * mask
    while True:
        spread = torch.nn.functional.max_pool2d(labels.float(), 3, stride=1, padding=1).long() * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _nearest(pixels: Tensor, palette: dict[str, tuple[int, int, int]]) -> Tensor:
    """Index of the nearest palette colour for every pixel of `[n, 3, h, w]`."""
    return (pixels[:, None] - _palette(palette)[None, :, :, None, None]).norm(dim=2).argmin(1)


def _palette(palette: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(palette.values())) / 255


def _place(value: float, centres: dict[str, int]) -> str:
    return min(centres, key=lambda name: abs(centres[name] - value))


def _to_tensor(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(0, 3, 1, 2) / 255
