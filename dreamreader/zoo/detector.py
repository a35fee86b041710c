"""Reads the attributes of a scene back from its pixels, without a learned part.

Background: the commonest palette colour inside the frame zone. Objects: connected regions that
differ from it. Colour: vote of a region's inner pixels. Shape: best overlap with the five drawn
shapes at the region's own area.
"""

import functools
import itertools
from collections.abc import Sequence
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
SMALL_BELOW = 22.0  # pixels, longer side of the bounding box
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
    pixels = images if isinstance(images, Tensor) else pictures_to_tensor(images)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, scenes.SIZE_PX, scenes.SIZE_PX):
        raise ValueError(f"detect: expected pictures [n, 3, 64, 64], got {list(pixels.shape)}")
    pixels = pixels.detach().float().cpu()
    back = _nearest(pixels[:, :, _EDGE:-_EDGE, _EDGE:-_EDGE], scenes.BACKGROUNDS)
    names = list(scenes.BACKGROUNDS)
    counts = torch.stack([(back == i).flatten(1).sum(1) for i in range(len(names))], 1)
    chosen = counts.argmax(1)
    palette = _palette(scenes.BACKGROUNDS)[chosen]  # [n, 3]
    framed = _has_frame(pixels)
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
    inner = mask & (distance >= distance[mask].median())
    votes = _nearest(picture[None, :, inner][..., None], scenes.COLORS).flatten()
    color = list(scenes.COLORS)[int(votes.bincount(minlength=len(scenes.COLORS)).argmax())]
    coverage = (distance / distance[inner].median()).clamp(
        max=1
    ) * mask  # 1 inside, 0.5 on the outline
    mask = coverage > 0.5
    ys, xs = (v.float() for v in mask.nonzero(as_tuple=True))
    top, bottom, left, right = (float(v) for v in (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1))
    return Found(
        shape=_shape(coverage),
        color=color,
        size="small" if max(bottom - top, right - left) < SMALL_BELOW else "large",
        row=_place((top + bottom) / 2, scenes.ROWS),
        column=_place((left + right) / 2, scenes.COLUMNS),
        mask=mask,
    )


def shape_overlaps(coverage: Float[Tensor, "h w"]) -> dict[str, float]:
    """Soft intersection over union with each drawn shape, at the same centroid and area.

    Area and centroid survive the blur of an autoencoder; a bounding box does not.

    Args:
        coverage: 1 inside the object, 0 outside, such as `Found.mask.float()`; not all 0.
    """
    names, templates = _templates()
    mine = _normalise(coverage)
    shared, whole = torch.minimum(templates, mine), torch.maximum(templates, mine)
    overlaps = (shared.sum((1, 2)) / whole.sum((1, 2))).tolist()
    return {
        name: max(value for other, value in zip(names, overlaps, strict=True) if other == name)
        for name in dict.fromkeys(names)
    }


def _shape(coverage: Tensor) -> str | None:
    """The shape that overlaps best, if it does so well enough."""
    overlaps = shape_overlaps(coverage)
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= MIN_OVERLAP else None


def _normalise(coverage: Tensor) -> Tensor:
    """Coverage [32, 32] around the centroid, over 2.3 times the root of the area."""
    area = coverage.sum()
    at = torch.arange(scenes.SIZE_PX) + 0.5
    cy, cx = (coverage.sum(1) @ at) / area, (coverage.sum(0) @ at) / area
    span = torch.linspace(-1.15, 1.15, 32) * area.sqrt()
    y, x = torch.meshgrid(cy + span, cx + span, indexing="ij")
    grid = torch.stack([x, y], -1)[None] / (scenes.SIZE_PX / 2) - 1
    return torch.nn.functional.grid_sample(coverage[None, None], grid, align_corners=False)[0, 0]


@functools.cache
def _templates() -> tuple[list[str], Tensor]:
    """Names and coverage [n, 32, 32] of every shape and size, sharp and blurred by a pixel."""
    names, found = [], []
    for name, half in itertools.product(scenes.SHAPES, scenes.SIZES.values()):
        side = scenes.SIZE_PX * scenes.SUPERSAMPLE
        canvas = Image.new("L", (side, side))
        scenes.draw_shape(ImageDraw.Draw(canvas), name, (32, 32), half, 255)
        sharp = torch.from_numpy(np.asarray(canvas.reduce(scenes.SUPERSAMPLE)).copy()) / 255
        blurred = torch.nn.functional.avg_pool2d(sharp[None, None], 3, stride=1, padding=1)[0, 0]
        names += [name, name]
        found += [_normalise(sharp), _normalise(blurred)]
    return names, torch.stack(found)


def _has_frame(pixels: Tensor) -> Tensor:
    border = torch.ones(scenes.SIZE_PX, scenes.SIZE_PX, dtype=torch.bool)
    width = scenes.FRAME_PX - 1  # the innermost ring is half mixed with the picture
    border[width:-width, width:-width] = False
    frame = torch.tensor(scenes.FRAME_COLOR) / 255
    near = (pixels - frame[None, :, None, None]).norm(dim=1) < 0.25
    return near[:, border].float().mean(1) > 0.6


def _components(mask: Tensor) -> Tensor:
    """Labels of 8-connected regions [n, h, w], 0 outside: the largest index spreads."""
    n, h, w = mask.shape
    labels = (torch.arange(h * w).view(1, h, w) + 1).expand(n, h, w) * mask
    while True:
        spread = (
            torch.nn.functional.max_pool2d(labels.float(), 3, stride=1, padding=1).long() * mask
        )
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


def pictures_to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """[rows, 3, h, w] from 0 to 1, of pictures of one size."""
    return (
        torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images])).permute(
            0, 3, 1, 2
        )
        / 255
    )
