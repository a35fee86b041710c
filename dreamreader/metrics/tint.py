"""How far a colour has gone from one to another."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics.base import Column, Outputs, pairs
from dreamreader.zoo import scenes
from dreamreader.zoo.detector import detect


@dataclass(frozen=True)
class Tint:
    """Share of the way between two colours, in the place of the reference's largest object.

    `t = <c - c_source, c_target - c_source> / |c_target - c_source|^2`, c the mean colour in the
    object's mask: 0 at the source, 1 at the target. The detector's colour is a yes or no; this also
    sees half of an effect. None where the reference shows no object.

    Args:
        source, target: colours; None: those of each row's columns `source` and `target`.
    """

    source: str | None = None
    target: str | None = None

    name: ClassVar[str] = "tint"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for each in (self.source, self.target):
            if each is not None:
                _color_values(each)
        if self.source is not None and self.source == self.target:
            raise InvalidInput(f"tint: source and target are both {self.source}")

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        images, before = pairs(self.name, "images", got, reference)
        sources, targets = self._colors(got, "source"), self._colors(got, "target")
        column: Column = []
        for image, reading, a, b in zip(images, detect(before), sources, targets, strict=True):
            if not reading.objects or a is None or b is None:
                column.append(None)
            else:
                column.append(float(tint(image[None], reading.objects[0].mask[None], a, b)))
        return {"tint": column}

    def _colors(self, got: Outputs, name: str) -> list[str | None]:
        given = getattr(self, name)
        if given is not None:
            return [given] * len(got.rows)
        found = got.column(name)
        if all(each is None for each in found) and found:
            raise InvalidInput(
                f"tint: the rows have no column {name!r} with a colour; give the option {name}"
            )
        return [None if each is None else _color_values(each) for each in found]


def tint(
    images: Float[Tensor, "n 3 h w"], masks: Bool[Tensor, "n h w"], source: str, target: str
) -> Float[Tensor, " n"]:
    """How far the mean colour within each mask lies on the way from `source` (0) to `target` (1).

    Raises:
        UnknownName: there is no such colour.
    """
    a, b = (torch.tensor(scenes.COLORS[_color_values(name)]) / 255 for name in (source, target))
    pixels = images.detach().float().cpu()
    weight = masks.float().cpu()
    color = (pixels * weight[:, None]).sum((2, 3)) / weight.sum((1, 2)).clamp(min=1)[:, None]
    return (color - a) @ (b - a) / (b - a).square().sum()


def _color_values(color: str) -> str:
    if color not in scenes.COLORS:
        raise UnknownName("colour", str(color), scenes.COLORS)
    return color
