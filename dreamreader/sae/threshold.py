"""The threshold of inference: a running mean of the smallest value that training kept."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows


@dataclass(frozen=True)
class ThresholdRule:
    """How the threshold follows the smallest positive value that was kept in a step.

    Formula: t <- decay t + (1 - decay) smallest.

    Attributes:
        start: value before the first update; a negative one means none yet.
        after: steps without an update at the beginning.
        decay: of the running mean.
        first_assigns: the first update sets the threshold instead of moving it.
        idle_counts: a step in which nothing is active counts as a smallest value of 0; else it is
            left out.

    Reference:
        `BatchTopKTrainer` of dictionary_learning 0.1; `BatchTopKTrainingSAE` of SAELens 6.54.
    """

    start: float = -1.0
    after: int = 1001
    decay: float = 0.999
    first_assigns: bool = True
    idle_counts: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.decay, int | float) and 0 <= self.decay < 1):
            raise InvalidInput(f"ThresholdRule: decay is from 0 to below 1, got {self.decay!r}")
        if not (isinstance(self.start, int | float) and math.isfinite(self.start)):
            raise InvalidInput(f"ThresholdRule: start is a finite number, got {self.start!r}")
        if not isinstance(self.after, int) or self.after < 0:
            raise InvalidInput(f"ThresholdRule: after is a number of steps, got {self.after!r}")


THRESHOLD_RULES = {
    "dictionary_learning": ThresholdRule(),
    "saelens": ThresholdRule(0.0, 0, 0.99, first_assigns=False, idle_counts=False),
}


@torch.no_grad()
def find_smallest(codes: SparseRows, by_row: bool = False) -> Float[Tensor, ""]:
    """The smallest positive value of codes, float32 []; -1 where there is none.

    Args:
        by_row: the mean over rows of their smallest values, where each row has a budget of its own.
    """
    values = codes.values.detach().float()
    active = (codes.columns >= 0) & ~(values <= 0)  # NaN stays, so that it is seen
    values = torch.where(active, values, torch.inf)
    row = codes.row_of().clamp(min=0) if by_row else torch.zeros_like(codes.columns).long()
    rows = codes.rows if by_row else 1
    least = values.new_full((rows,), torch.inf).scatter_reduce(0, row, values, "amin")
    used = torch.zeros_like(least, dtype=torch.bool).scatter_reduce(0, row, active, "amax")
    mean = torch.where(used, least, 0.0).sum() / used.sum()
    return torch.where(used.any(), mean, -1.0)


@torch.no_grad()
def update_threshold(
    rule: ThresholdRule, mean: Float[Tensor, ""], smallest: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """The running mean after a step; values that are not finite change nothing.

    Args:
        mean: float64, before the step. smallest: what `find_smallest` gave.

    Returns:
        float64, new memory.
    """
    idle = smallest < 0
    seen = smallest.double().clamp(min=0)  # NaN stays
    moved = rule.decay * mean + (1 - rule.decay) * seen
    if rule.first_assigns:
        moved = torch.where(mean < 0, seen, moved)
    left_out = ~seen.isfinite() if rule.idle_counts else ~seen.isfinite() | idle
    return torch.where(left_out, mean, moved)
