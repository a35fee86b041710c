"""The only places where operators allocate, so that tests can poison what a kernel leaves out."""

from collections.abc import Sequence

import torch
from torch import Tensor


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor with unspecified values."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: Tensor) -> Tensor:
    """A new tensor with the shape, dtype, device and (where dense) the memory order of `x`."""
    return torch.empty_like(x)
