"""How far the denoiser's outputs are from those of the reference, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dreamreader.errors import InvalidInput
from dreamreader.metrics.base import Column, Outputs, pairs
from dreamreader.metrics.distances import relative


@dataclass(frozen=True)
class NoiseDistance:
    """`|a - b| / |b|` over a row's denoiser output: `noise_distance_<step>`, and the mean of them.

    Args:
        steps: indices of denoising steps; None: all that were kept.
    """

    steps: Sequence[int] | None = None

    name: ClassVar[str] = "noise_distance"
    needs: ClassVar[frozenset[str]] = frozenset({"noise"})
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps is None:
            return
        if isinstance(self.steps, str) or not self.steps or not all(map(_is_step, self.steps)):
            raise InvalidInput(f"noise_distance: steps must be whole numbers, got {self.steps!r}")

    @property
    def numbers(self) -> tuple[str, ...] | None:
        """Columns; None where the steps are those of the run."""
        if self.steps is None:
            return None
        return (self.name, *(f"{self.name}_{step}" for step in self.steps))

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        a, b = pairs(self.name, "noise", got, reference)
        columns: dict[str, Column] = {}
        for step in sorted(a) if self.steps is None else self.steps:
            for name, kept in (("outputs", a), ("reference outputs", b)):
                if step not in kept:
                    there = ", ".join(map(str, sorted(kept)))
                    raise InvalidInput(
                        f"noise_distance: the {name} lack step {step}; they have {there}"
                    )
            if a[step].shape != b[step].shape:
                raise InvalidInput(
                    f"noise_distance: step {step} is {list(a[step].shape)}, that of the reference "
                    f"{list(b[step].shape)}"
                )
            columns[f"{self.name}_{step}"] = relative(a[step], b[step])
        rows = zip(*columns.values(), strict=True)
        return {self.name: [_mean(row) for row in rows], **columns}


def _mean(values: Sequence[float | bool | str | None]) -> float | None:
    found = [each for each in values if isinstance(each, float)]
    return sum(found) / len(found) if len(found) == len(values) else None


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
