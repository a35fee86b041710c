"""Constraints of the weights, and where they begin."""

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 64  # rows that stay in the cache: five times as fast as all at once
_LEAST = 1e-8  # a row without length stays what it is


@torch.no_grad()
def unit_rows_(weight: Float[Tensor, "d_sae d_in"]) -> None:
    """Divides each row by its length, in place."""
    weight.div_(row_norms(weight).unsqueeze(1))


def row_norms(weight: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """The length of each row; tiny ones count as 1e-8."""
    return weight.norm(dim=1).clamp(min=_LEAST)


@torch.no_grad()
def scale_rows(
    weight: Float[Tensor, "d_sae d_in"], scale: Float[Tensor, " d_sae"], dtype: torch.dtype
) -> Float[Tensor, "d_sae d_in"]:
    """Each row times its number, in a dtype; new memory, without gradients."""
    found = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows = _BLOCK if weight.device.type == "cpu" else max(1, len(weight))
    parts = (each.split(rows) for each in (found, weight, scale.unsqueeze(1)))
    for out, w, s in zip(*parts, strict=True):
        out.copy_(w * s)
    return found


@torch.no_grad()
def remove_parallel_(
    gradient: Float[Tensor, "d_sae d_in"], weight: Float[Tensor, "d_sae d_in"]
) -> None:
    """Takes from each row of a gradient what points along the row of the weight, in place.

    Formula: g_j <- g_j - <g_j, w_j> w_j / |w_j|^2.
    """
    rows = _BLOCK if gradient.device.type == "cpu" else max(1, len(gradient))
    for g, w in zip(gradient.split(rows), weight.split(rows), strict=True):
        along = torch.linalg.vecdot(g, w) / row_norms(w).square()
        g.addcmul_(w, along.unsqueeze(1), value=-1)


@torch.no_grad()
def align_rows_(encoder: Float[Tensor, "d_sae d_in"], decoder: Float[Tensor, "d_sae d_in"]) -> None:
    """Moves each encoder row along its decoder row until their inner product is 1, in place.

    Formula: e_j <- e_j + (1 - <e_j, d_j>) d_j / |d_j|^2.

    Reference:
        Aligned parametrisation, arXiv:2605.18629.
    """
    lacking = (1 - (encoder * decoder).sum(1)) / row_norms(decoder).square()
    encoder.addcmul_(decoder, lacking.unsqueeze(1))


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "rows d_in"], steps: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d_in"]:
    """The point with the least sum of distances to the rows, float32.

    Formula: Weiszfeld's m <- sum_i x_i / |x_i - m| over sum_i 1 / |x_i - m|, from the mean.

    Args:
        steps: at most. tolerance: the length of a step with which it ends.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [90.0, 90.0]])
        >>> bool((geometric_median(x).abs() < 1).all())
        True
    """
    rows = x.float()
    median = rows.mean(0)
    for _ in range(steps):
        weights = 1 / (rows - median).norm(dim=1).clamp(min=_LEAST)
        before, median = median, (weights / weights.sum()) @ rows
        if bool((median - before).norm() < tolerance):
            break
    return median


def random_directions(
    d_sae: int, d_in: int, norm: float, generator: torch.Generator
) -> Float[Tensor, "d_sae d_in"]:
    """Rows of a length in all directions alike, float32 on the CPU."""
    weight = torch.randn(d_sae, d_in, generator=generator)
    return weight * (norm / row_norms(weight).unsqueeze(1))
