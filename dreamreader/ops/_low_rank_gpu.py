"""Which calls of `low_rank` the GPU kernels take, and their launches.

What they do not take, by its dtype, rank or width, goes to the reference.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import native

TRITON = "dreamreader.triton_kernels.low_rank"
MAX_RANK = 64
MAX_WIDTH = 8192

_native: Any = native()[0]


def fits_kernels(x: Tensor, down: Tensor) -> bool:
    """Whether the kernels take this call."""
    fits = 1 <= down.shape[1] <= MAX_RANK and down.shape[2] <= MAX_WIDTH
    return fits and len(down) > 0 and x.numel() > 0 and x.dtype != torch.float64


def edit(launch: Callable[..., None], reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator `low_rank` through launch(x, out, *tables)."""

    def low_rank(x: Tensor, *tables: Tensor) -> Tensor:
        if not fits_kernels(x, tables[0]):
            return reference(x, *tables)
        out = _alloc.empty_like(x)
        launch(x, out, *tables)
        return out

    return low_rank


def edit_(launch: Callable[..., None], reference: Callable[..., None]) -> Callable[..., None]:
    """The operator `low_rank_`, in the memory of x."""

    def low_rank_(x: Tensor, *tables: Tensor) -> None:
        if not fits_kernels(x, tables[0]):
            return reference(x, *tables)
        launch(x, x, *tables)
        torch.autograd.graph.increment_version(x)

    return low_rank_


def gradient(launch: Callable[..., Any], reference: Callable, room: Callable) -> Callable:
    """The operator `low_rank_backward` through launch(grad, x, *tables, *results).

    `room` allocates the results; those that are not needed reach the launch as None.
    """

    def low_rank_backward(grad: Tensor, x: Tensor, *rest) -> tuple[Tensor, ...]:
        *tables, needs = rest
        if not fits_kernels(x, tables[0]):
            return reference(grad, x, *rest)
        results = room(grad, *tables[:4], needs)
        wanted = (needs[0], needs[1], needs[1], needs[2], needs[3])
        pairs = zip(results, wanted, strict=True)
        launch(grad, x, *tables, *(each if needed else None for each, needed in pairs))
        return results

    return low_rank_backward


def cuda(*arguments: Tensor) -> None:
    """The CUDA kernel."""
    _native.low_rank_cuda(*arguments)


def cuda_backward(grad: Tensor, x: Tensor, down: Tensor, *rest: Tensor | None) -> None:
    """The CUDA kernels of the gradient, with the memory that they need."""
    floats = _native.low_rank_workspace_cuda(*x.shape, down.shape[1], len(down))
    workspace = _alloc.empty((floats,), dtype=torch.float32, device=x.device)
    _native.low_rank_backward_cuda(grad, x, down, *rest, workspace)


def triton(*arguments: Tensor) -> None:
    """The Triton kernel."""
    import_module(TRITON).low_rank(*arguments)


def triton_backward(*arguments: Tensor | None) -> None:
    """The Triton kernels of the gradient."""
    import_module(TRITON).low_rank_backward(*arguments)
