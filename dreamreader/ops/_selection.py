"""What selections share: which entries take part, their rows from a mask, and their gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamreader import _alloc
from dreamreader.ops._arguments import check_tensor, refuse
from dreamreader.ops._types import FLOATS, NEEDED
from dreamreader.ops.sparse_rows import SparseRows

Rows = tuple[Tensor, Tensor, Tensor]  # values, row_ptr, columns: what has a gradient comes first


def check_matrix(name: str, x: Tensor, what: str = "x") -> None:
    """Raises InvalidInput unless x is a dense [rows, columns] of floating point."""
    wanted = f"[rows, columns] of {NEEDED}"
    check_tensor(name, what, x, wanted)
    if x.dim() != 2 or x.dtype not in FLOATS:
        refuse(name, what, wanted, x)


def empty_rows(x: Tensor, slots: int) -> Rows:
    """Memory for the entries of a selection from x."""
    return (
        _alloc.empty((slots,), dtype=x.dtype, device=x.device),
        _alloc.empty((x.shape[0] + 1,), dtype=torch.int64, device=x.device),
        _alloc.empty((slots,), dtype=torch.int32, device=x.device),
    )


def no_entries(x: Tensor, slots: int) -> Rows:
    """What a selection of nothing from x gives."""
    values, row_ptr, columns = empty_rows(x, slots)
    return values.zero_(), row_ptr.zero_(), columns.fill_(-1)


def sparse_rows(found: Sequence[Tensor], width: int) -> SparseRows:
    """What an operator gave as the public functions give it."""
    values, *threshold, row_ptr, columns = found
    return SparseRows(row_ptr, columns, values, width, *threshold)


def dense_rows(x: Tensor) -> Tensor:
    """x with the entries of a row one after the other, as the kernels read them."""
    if not x.numel():  # whose strides `contiguous` would keep
        return x.new_empty(x.shape)
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def eligible(x: Tensor) -> Tensor:
    """The keys of a selection: x where it is above 0, one NaN for every NaN, else 0."""
    positive = torch.where(x > 0, x, 0.0)
    return torch.where(x.isnan(), torch.nan, positive)


def rows_of_mask(keys: Tensor, mask: Tensor, slots: int) -> Rows:
    """The entries of a mask; none where there are more of them than slots.

    Args:
        keys: [n, F].
        mask: bool [n, F].
        slots: how many entries there is room for.

    Returns:
        [slots], int64 [n + 1], int32 [slots].
    """
    rows, width = keys.shape
    row_ptr = mask.new_zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(mask.sum(1), 0, out=row_ptr[1:])
    flat = mask.reshape(-1)
    place = torch.where(flat & (row_ptr[-1] <= slots), flat.cumsum(0) - 1, slots)
    column = torch.arange(width, device=keys.device, dtype=torch.int32).repeat(rows)
    columns = column.new_full((slots + 1,), -1).scatter(0, place, column)
    values = keys.new_zeros(slots + 1).scatter(0, place, keys.reshape(-1))
    return values[:-1].clone(), row_ptr, columns[:-1].clone()


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps what the gradient needs: where the entries are."""
    _, *threshold, row_ptr, columns = output
    ctx.mark_non_differentiable(*threshold)
    ctx.save_for_backward(row_ptr, columns)
    ctx.shape, ctx.others = inputs[0].shape, len(inputs) - 1


def backward(ctx: Any, *grads: Tensor | None) -> tuple:
    """The gradient of the values at the places of the entries, 0 elsewhere."""
    row_ptr, columns = ctx.saved_tensors
    grad = grads[0]
    if grad is None:
        return (None,) * (1 + ctx.others)
    dense = SparseRows(row_ptr, columns, grad, ctx.shape[1]).spread()
    return dense, *(None,) * ctx.others
