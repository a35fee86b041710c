"""Distances between tensors, row by row."""

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.metrics.base import Column


def relative(a: Float[Tensor, "n ..."], b: Float[Tensor, "n ..."]) -> Column:
    """|a - b| / |b| of each row, in float64; None where b is zero or a value is not finite."""
    x, y = (each.detach().to("cpu", torch.float64).flatten(1) for each in (a, b))
    share = (x - y).norm(dim=1) / y.norm(dim=1)
    return [each if share[row].isfinite() else None for row, each in enumerate(share.tolist())]
