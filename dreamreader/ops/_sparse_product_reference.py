"""Definitions of the products of sparse rows in plain torch."""

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput


def sparse_decode_reference(
    row_ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The definition of `sparse_decode` in plain torch, on any device.

    Args:
        row_ptr: int64 [N + 1]. columns: int32 [S]. values: [S]. weight: [F, D]. bias: [D].

    Returns:
        [N, D].
    """
    wide = work_type(values, weight)
    slot, row, column = _entries(row_ptr, columns, len(weight))
    terms = values[slot, None].to(wide) * weight[column].to(wide)  # [entries, D]
    y = _segment_sums(terms, row, len(row_ptr) - 1)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(dtype or weight.dtype)


def sparse_dots_reference(
    row_ptr: Tensor, columns: Tensor, rows: Tensor, weight: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """The definition of `sparse_dots` in plain torch, on any device.

    Args:
        row_ptr: int64 [N + 1]. columns: int32 [S]. rows: [N, D]. weight: [F, D].

    Returns:
        [S].
    """
    wide = work_type(rows, weight)
    slot, row, column = _entries(row_ptr, columns, len(weight))
    out = torch.zeros(columns.shape, dtype=wide, device=columns.device)
    out[slot] = (rows[row].to(wide) * weight[column].to(wide)).sum(-1)
    return out.to(dtype or torch.promote_types(rows.dtype, weight.dtype))


def sparse_outer_reference(
    row_ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    rows: Tensor,
    width: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """The definition of `sparse_outer` in plain torch, on any device.

    Args:
        row_ptr: int64 [N + 1]. columns: int32 [S]. values: [S]. rows: [N, D]. width: F.

    Returns:
        [F, D].
    """
    wide = work_type(values, rows)
    slot, row, column = _entries(row_ptr, columns, width)
    column, order = column.sort(stable=True)
    terms = values[slot[order], None].to(wide) * rows[row[order]].to(wide)  # [entries, D]
    return _segment_sums(terms, column, width).to(dtype or rows.dtype)


def sparse_column_sums_reference(
    row_ptr: Tensor, columns: Tensor, values: Tensor, width: int, dtype: torch.dtype | None
) -> Tensor:
    """The definition of `sparse_column_sums` in plain torch, on any device.

    Args:
        row_ptr: int64 [N + 1]. columns: int32 [S]. values: [S]. width: F.

    Returns:
        [F].
    """
    slot, _, column = _entries(row_ptr, columns, width)
    column, order = column.sort(stable=True)
    terms = values[slot[order]].to(work_type(values))
    return _segment_sums(terms, column, width).to(dtype or values.dtype)


def sparse_decode_backward_reference(
    grad: Tensor, row_ptr: Tensor, columns: Tensor, values: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the values and the weight of `sparse_decode`, in plain torch on any device.

    Args:
        grad: [N, D], gradient of the result; the others as in `sparse_decode_reference`.

    Returns:
        [S] and [F, D], like values and weight.
    """
    d_values = sparse_dots_reference(row_ptr, columns, grad, weight, values.dtype)
    width = len(weight)
    return d_values, sparse_outer_reference(row_ptr, columns, values, grad, width, weight.dtype)


def work_type(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _entries(row_ptr: Tensor, columns: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slot, row and column of every entry, int64, in ascending order of slots."""
    check_places(row_ptr, columns, width)
    slot = is_entry(row_ptr, columns).nonzero().squeeze(1)
    row = torch.searchsorted(row_ptr, slot, right=True) - 1
    return slot, row, columns[slot].long()


def check_places(row_ptr: Tensor, columns: Tensor, width: int) -> None:
    """Raises InvalidInput for entries without a slot or a column: no graph can hold the check."""
    last = int(row_ptr[-1])
    if last > len(columns):
        raise InvalidInput(
            f"sparse product: row_ptr counts {last} entries, there is room for {len(columns)}; "
            "select them again with more slots"
        )
    if not last:
        return
    # By numpy: torch would wake its threads for this, and wait for them on a busy machine.
    there = columns[:last]
    largest = int(there.numpy().max() if columns.device.type == "cpu" else there.max())
    if largest >= width:
        raise InvalidInput(
            f"sparse product: an entry has column {largest}, there are {width} columns"
        )


def is_entry(row_ptr: Tensor, columns: Tensor) -> Tensor:
    slot = torch.arange(len(columns), device=columns.device)
    return (columns >= 0) & (slot >= row_ptr[0]) & (slot < row_ptr[-1])


def _segment_sums(terms: Tensor, segment: Tensor, count: int) -> Tensor:
    """Sums of what has the same segment, in its order; segments ascend."""
    offsets = torch.searchsorted(segment, torch.arange(count + 1, device=segment.device))
    if not terms.numel():
        return terms.new_zeros(count, *terms.shape[1:])
    return torch.segment_reduce(terms, "sum", offsets=offsets, axis=0, initial=0)
