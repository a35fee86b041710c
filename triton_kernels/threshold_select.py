"""The positive entries above a threshold in Triton: every candidate is kept, see `_candidates`."""

import torch
from dreamreader.triton_kernels._candidates import Candidates
from dreamreader.triton_kernels._selection import FORMS, block_of, words
from torch import Tensor


def supported(x: Tensor) -> bool:
    """Whether the kernels take a call: not float64."""
    return x.dtype in FORMS


def limits(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """int32, as threshold: the order from which on values of the type are not above it.

    A value is above it where its bits exceed those of the largest value that is not.
    """
    form = FORMS[dtype]
    positive = threshold.clamp(min=0).nan_to_num(torch.inf, torch.inf)  # NaN is above infinity
    nearest = positive.to(dtype)
    rounded_up = (nearest.float() > positive).int()
    bits = words(nearest).int() - rounded_up
    return (1 << form.bits) - 1 - bits


def threshold_select(
    x: Tensor, threshold: Tensor, values: Tensor, row_ptr: Tensor, columns: Tensor
) -> None:
    """Writes the entries; rows of x are dense, and there is at least one entry."""
    rows, width = x.shape
    limit = limits(threshold, x.dtype)
    found = Candidates(x, rows, width, block_of(width), len(columns), 0, limit)
    found.append(x)
    found.write(None, None, values, row_ptr, columns)
