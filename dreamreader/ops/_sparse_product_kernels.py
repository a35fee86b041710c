"""The kernels of the products of sparse rows, called with what they take: dense rows, one type."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import native
from dreamreader.ops import _sparse_product_reference as reference
from dreamreader.ops._selection import dense_rows
from dreamreader.ops._sparse_product_reference import check_places, work_type

TRITON = "dreamreader.triton_kernels.sparse_product"
MAX_D = 8192  # columns whose sums the kernel of both gradients holds

_native: Any = native()[0]


def cpu_decode(
    row_ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """`sparse_decode` by the CPU kernel."""
    check_places(row_ptr, columns, len(weight))
    wide = work_type(values, weight)
    matrix = dense_rows(weight.to(wide) if wide == torch.float64 else weight)
    out = _out((len(row_ptr) - 1, weight.shape[1]), matrix, dtype or weight.dtype, wide)
    start = None if bias is None else bias.to(wide).contiguous()
    _native.sparse_decode_cpu(
        row_ptr.contiguous(),
        columns.contiguous(),
        values.to(wide).contiguous(),
        matrix,
        start,
        out,
        torch.get_num_threads(),
    )
    return out.to(dtype or weight.dtype)


def cpu_dots(
    row_ptr: Tensor, columns: Tensor, rows: Tensor, weight: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """`sparse_dots` by the CPU kernel."""
    check_places(row_ptr, columns, len(weight))
    wide = work_type(rows, weight)
    common = torch.promote_types(rows.dtype, weight.dtype)  # exact for the narrower one
    out = _alloc.empty(columns.shape, dtype=wide, device=columns.device)
    _native.sparse_dots_cpu(
        row_ptr.contiguous(),
        columns.contiguous(),
        dense_rows(rows.to(common)),
        dense_rows(weight.to(common)),
        out,
        torch.get_num_threads(),
    )
    return out.to(dtype or common)


def cpu_outer(
    row_ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    rows: Tensor,
    width: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """`sparse_outer` by the CPU kernel."""
    check_places(row_ptr, columns, width)
    wide = work_type(values, rows)
    matrix = dense_rows(rows.to(wide) if wide == torch.float64 else rows)
    out = _out((width, rows.shape[1]), matrix, dtype or rows.dtype, wide)
    _native.sparse_outer_cpu(
        row_ptr.contiguous(),
        columns.contiguous(),
        values.to(wide).contiguous(),
        matrix,
        out,
        torch.get_num_threads(),
    )
    return out.to(dtype or rows.dtype)


def cpu_column_sums(
    row_ptr: Tensor, columns: Tensor, values: Tensor, width: int, dtype: torch.dtype | None
) -> Tensor:
    """`sparse_column_sums` by the CPU kernel."""
    check_places(row_ptr, columns, width)
    wide = work_type(values)
    out = _alloc.empty((width,), dtype=wide, device=values.device)
    wider = values.to(wide).contiguous()
    _native.sparse_column_sums_cpu(row_ptr.contiguous(), columns.contiguous(), wider, out)
    return out.to(dtype or values.dtype)


def cpu_decode_backward(
    grad: Tensor, row_ptr: Tensor, columns: Tensor, values: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`sparse_decode_backward` by the CPU kernel, which reads each row of grad once for both."""
    width, d = weight.shape
    if d > MAX_D:
        d_values = cpu_dots(row_ptr, columns, grad, weight, values.dtype)
        return d_values, cpu_outer(row_ptr, columns, values, grad, width, weight.dtype)
    check_places(row_ptr, columns, width)
    wide = work_type(values, weight, grad)
    common = wide if wide == torch.float64 else torch.promote_types(grad.dtype, weight.dtype)
    rows = dense_rows(grad.to(common))
    d_values = _alloc.empty(columns.shape, dtype=wide, device=columns.device)
    d_weight = _out((width, d), rows, weight.dtype, wide)
    _native.sparse_decode_backward_cpu(
        rows,
        row_ptr.contiguous(),
        columns.contiguous(),
        values.to(wide).contiguous(),
        dense_rows(weight.to(common)),
        d_values,
        d_weight,
        torch.get_num_threads(),
    )
    return d_values.to(values.dtype), d_weight.to(weight.dtype)


def triton_decode(
    row_ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """`sparse_decode` by the Triton kernel."""
    kernel = import_module(TRITON)
    if not kernel.supported(values, weight):
        return reference.sparse_decode_reference(row_ptr, columns, values, weight, bias, dtype)
    shape = len(row_ptr) - 1, weight.shape[1]
    out = _alloc.empty(shape, dtype=dtype or weight.dtype, device=weight.device)
    start = None if bias is None else bias.contiguous()
    kernel.sparse_decode(*_dense(row_ptr, columns, values), dense_rows(weight), start, out)
    return out


def triton_dots(
    row_ptr: Tensor, columns: Tensor, rows: Tensor, weight: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """`sparse_dots` by the Triton kernel."""
    kernel = import_module(TRITON)
    if not kernel.supported(rows, weight):
        return reference.sparse_dots_reference(row_ptr, columns, rows, weight, dtype)
    dtype = dtype or torch.promote_types(rows.dtype, weight.dtype)
    out = _alloc.empty(columns.shape, dtype=dtype, device=columns.device)
    kernel.sparse_dots(*_dense(row_ptr, columns), dense_rows(rows), dense_rows(weight), out)
    return out


def triton_outer(
    row_ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    rows: Tensor,
    width: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """`sparse_outer` by the Triton kernels."""
    kernel = import_module(TRITON)
    if not kernel.supported(values, rows):
        return reference.sparse_outer_reference(row_ptr, columns, values, rows, width, dtype)
    shape = width, rows.shape[1]
    out = _alloc.empty(shape, dtype=dtype or rows.dtype, device=rows.device)
    kernel.sparse_outer(*_dense(row_ptr, columns, values), dense_rows(rows), out)
    return out


def triton_decode_backward(
    grad: Tensor, row_ptr: Tensor, columns: Tensor, values: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`sparse_decode_backward` by the Triton kernels of its two parts."""
    d_values = triton_dots(row_ptr, columns, grad, weight, values.dtype)
    d_weight = triton_outer(row_ptr, columns, values, grad, len(weight), weight.dtype)
    return d_values, d_weight


def triton_column_sums(
    row_ptr: Tensor, columns: Tensor, values: Tensor, width: int, dtype: torch.dtype | None
) -> Tensor:
    """`sparse_column_sums` by the Triton kernels."""
    kernel = import_module(TRITON)
    if not kernel.supported(values):
        return reference.sparse_column_sums_reference(row_ptr, columns, values, width, dtype)
    out = _alloc.empty((width,), dtype=dtype or values.dtype, device=values.device)
    kernel.sparse_column_sums(*_dense(row_ptr, columns, values), out)
    return out


def _dense(*vectors: Tensor) -> list[Tensor]:
    return [each.contiguous() for each in vectors]


def _out(shape: tuple[int, int], matrix: Tensor, dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """For a kernel that gives the type of the matrix or the one it computes in."""
    own = dtype if dtype in (matrix.dtype, wide) else wide
    # Never touched: the result may then lie in the memory of an earlier one.
    return _alloc.empty_like(torch.empty(shape, dtype=own))
