"""The only places where operators allocate, so that tests can poison what a kernel leaves out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamreader._register import native

_LARGE = 256 << 10  # bytes; of smaller results the C library hands out pages in use
_reused: Any = getattr(native()[0], "reused", None)
_reused_like: Any = getattr(native()[0], "reused_like", None)


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor with unspecified values."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: Tensor) -> Tensor:
    """A new tensor with the shape, dtype, device and (where dense) the memory order of `x`.

    Large ones in main memory lie in memory of earlier ones that nobody holds any more: to touch
    fresh pages takes ten times as long as an edit.
    """
    plain = type(x) is Tensor  # no tensor of a compiler, whose sizes may be symbols
    if _reused is None or not plain or not x.is_cpu or x.nbytes < _LARGE:
        return torch.empty_like(x)
    if x.is_contiguous() and not x.requires_grad:
        return torch.from_dlpack(_reused_like(x))
    strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
    memory = torch.from_dlpack(_reused(x.nbytes)).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(memory, 0, x.shape, strides)


def empty_like_of(x: Tensor) -> Callable[[Tensor], Tensor]:
    """`empty_like` for tensors of the form of x: torch's own where it comes to that."""
    large = _reused is not None and x.is_cpu and x.nbytes >= _LARGE
    return empty_like if large else torch.empty_like
