"""How far final latents are from those of the reference."""

from dataclasses import dataclass
from typing import ClassVar

from dreamreader.metrics.base import Column, Outputs, pairs
from dreamreader.metrics.distances import relative


@dataclass(frozen=True)
class LatentDistance:
    """`|a - b| / |b|` over the whole latents of a row; None where b is zero."""

    name: ClassVar[str] = "latent_distance"
    needs: ClassVar[frozenset[str]] = frozenset({"latents"})
    compares: ClassVar[bool] = True

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        return {self.name: relative(*pairs(self.name, "latents", got, reference))}
