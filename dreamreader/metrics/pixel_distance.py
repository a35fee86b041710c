"""How far pictures are from those of the reference."""

from dataclasses import dataclass
from typing import ClassVar

from dreamreader.metrics.base import Column, Outputs, pairs


@dataclass(frozen=True)
class PixelDistance:
    """Root of the mean squared difference over pixels and colour channels; 1 is black to white."""

    name: ClassVar[str] = "pixel_distance"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    compares: ClassVar[bool] = True

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        a, b = pairs(self.name, "images", got, reference)
        gap = a.detach().double().cpu() - b.detach().double().cpu()
        return {self.name: gap.flatten(1).square().mean(1).sqrt().tolist()}
