"""Products of sparse rows with dense ones in Triton.

A program instance sums BLOCK_E entries at a time, whose rows are in flight together, in columns of
one slice of the matrix. Rows run fastest over the grid and slices slowest, so that a slice of the
matrix stays in the second cache. Sums by column walk over the entries sorted by it; what a column
has beyond CHUNK entries is summed by other program instances before, and added in order. Results
are the same in every run.

An entry that leads out of the matrix makes what it counts in NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreamreader import _alloc

CHUNK = 256  # entries of a column that one program instance sums


@triton.jit
def _sum_rows(
    index_ptr,
    value_ptr,
    matrix_ptr,
    begin,
    end,
    slots,
    count,
    d,
    columns,  # [BLOCK_D]
    stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_D]: sum of value_e matrix[index_e] over the entries begin .. end - 1."""
    total = tl.zeros([BLOCK_E, BLOCK_D], dtype=tl.float32)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E).to(tl.int64)  # [BLOCK_E]
        there = (e < end) & (e < slots)
        index = tl.load(index_ptr + e, mask=there, other=-1).to(tl.int64)  # [BLOCK_E]
        value = tl.load(value_ptr + e, mask=there & (index >= 0), other=0.0).to(tl.float32)
        value = tl.where((index >= count) | ((e >= slots) & (e < end)), float("nan"), value)
        inside = ((index >= 0) & (index < count))[:, None] & (columns < d)[None, :]
        rows = tl.load(
            matrix_ptr + index[:, None] * stride + columns[None, :], mask=inside, other=0.0
        ).to(tl.float32)  # [BLOCK_E, BLOCK_D]
        total += value[:, None] * rows
    return tl.sum(total, axis=0)


@triton.jit
def _decode_kernel(
    row_ptr,  # [N + 1]
    column_ptr,  # [S]
    value_ptr,  # [S]
    weight_ptr,  # [F, D]
    bias_ptr,  # [D]
    out_ptr,  # [N, D]
    slots,
    width,
    d,
    weight_stride,
    BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)  # i * d exceeds 2**31
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    # y_i = bias + sum_e v_e W_f(e)
    y = _sum_rows(
        column_ptr,
        value_ptr,
        weight_ptr,
        tl.load(row_ptr + i),
        tl.load(row_ptr + i + 1),
        slots,
        width,
        d,
        columns,
        weight_stride,
        BLOCK_E,
        BLOCK_D,
    )
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(out_ptr + i * d + columns, y.to(out_ptr.dtype.element_ty), mask=columns < d)


@triton.jit
def _dots_kernel(
    row_ptr,  # [N + 1]
    column_ptr,  # [S]
    rows_ptr,  # [N, D]
    weight_ptr,  # [F, D]
    out_ptr,  # [S]
    slots,
    width,
    d,
    rows_stride,
    weight_stride,
    GROUPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    end = tl.load(row_ptr + i + 1)
    group = tl.program_id(1) * BLOCK_E
    for first in range(tl.load(row_ptr + i) + group, end, BLOCK_E * GROUPS):
        e = first + tl.arange(0, BLOCK_E).to(tl.int64)  # [BLOCK_E]
        there = (e < end) & (e < slots)
        index = tl.load(column_ptr + e, mask=there, other=-1).to(tl.int64)  # [BLOCK_E]
        inside = (index >= 0) & (index < width)
        total = tl.zeros([BLOCK_E, BLOCK_D], dtype=tl.float32)
        for begin in range(0, d, BLOCK_D):
            columns = begin + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
            x = tl.load(rows_ptr + i * rows_stride + columns, mask=columns < d, other=0.0)
            w = tl.load(
                weight_ptr + index[:, None] * weight_stride + columns[None, :],
                mask=inside[:, None] & (columns < d)[None, :],
                other=0.0,
            )  # [BLOCK_E, BLOCK_D]
            total += x.to(tl.float32)[None, :] * w.to(tl.float32)
        # p_e = <x_i, W_f(e)>
        p = tl.where(index >= width, float("nan"), tl.sum(total, axis=1))  # [BLOCK_E]
        tl.store(out_ptr + e, p.to(out_ptr.dtype.element_ty), mask=there & (index >= 0))


@triton.jit
def _chunks_kernel(
    first_ptr,  # [F + 1]: where the entries of each column begin
    chunk_ptr,  # [F + 1]: where its chunks after the first one begin among all such
    owner_ptr,  # [C]: the column of each such chunk, F of no chunk
    index_ptr,  # [S]: rows of the entries, sorted by column
    value_ptr,  # [S]
    rows_ptr,  # [N, D]
    part_ptr,  # [C, D]
    count,
    width,
    d,
    rows_stride,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    f = tl.load(owner_ptr + c)
    if f < width:
        begin = tl.load(first_ptr + f) + (c - tl.load(chunk_ptr + f) + 1) * SIZE
        end = tl.minimum(tl.load(first_ptr + f + 1), begin + SIZE)
        part = _sum_rows(
            index_ptr,
            value_ptr,
            rows_ptr,
            begin,
            end,
            end,
            count,
            d,
            columns,
            rows_stride,
            BLOCK_E,
            BLOCK_D,
        )
        tl.store(part_ptr + c * d + columns, part, mask=columns < d)


@triton.jit
def _outer_kernel(
    first_ptr,  # [F + 1]
    chunk_ptr,  # [F + 1]
    index_ptr,  # [S]
    value_ptr,  # [S]
    rows_ptr,  # [N, D]
    part_ptr,  # [C, D]
    out_ptr,  # [F, D]
    count,
    d,
    rows_stride,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    begin = tl.load(first_ptr + f)
    end = tl.minimum(tl.load(first_ptr + f + 1), begin + SIZE)
    # G_f = sum_e v_e x_i(e)
    g = _sum_rows(
        index_ptr,
        value_ptr,
        rows_ptr,
        begin,
        end,
        end,
        count,
        d,
        columns,
        rows_stride,
        BLOCK_E,
        BLOCK_D,
    )
    for c in range(tl.load(chunk_ptr + f), tl.load(chunk_ptr + f + 1)):
        g += tl.load(part_ptr + c * d + columns, mask=columns < d, other=0.0)
    tl.store(out_ptr + f * d + columns, g.to(out_ptr.dtype.element_ty), mask=columns < d)


class Settings(NamedTuple):
    """Launch settings of one problem size."""

    block_e: int
    block_d: int
    warps: int


def launch_settings(d: int) -> Settings:
    """A tile of entries by columns: 16 bytes of a bfloat16 row for each thread, twice."""
    return Settings(8, min(256, max(16, triton.next_power_of_2(d))), 4)


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels take a call with these values and matrices."""
    return all(each.dtype != torch.float64 for each in tensors)


def sparse_decode(
    row_ptr: Tensor,
    columns: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Writes out [N, D]; rows of weight are dense, all else is dense."""
    rows, d = out.shape
    if not out.numel():
        return
    chosen = launch_settings(d)
    _decode_kernel[(rows, triton.cdiv(d, chosen.block_d))](
        row_ptr,
        columns,
        values,
        weight,
        weight if bias is None else bias,  # not read without one
        out,
        len(columns),
        len(weight),
        d,
        weight.stride(0),
        BIAS=bias is not None,
        BLOCK_E=chosen.block_e,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
    )


def sparse_dots(
    row_ptr: Tensor, columns: Tensor, rows: Tensor, weight: Tensor, out: Tensor
) -> None:
    """Writes out [S]; rows of rows and weight are dense, all else is dense."""
    out.zero_()
    if not len(rows) or not len(columns):
        return
    chosen = launch_settings(rows.shape[1])
    mean = triton.cdiv(len(columns), len(rows) * chosen.block_e)
    groups = min(16, triton.next_power_of_2(mean))
    _dots_kernel[(len(rows), groups)](
        row_ptr,
        columns,
        rows,
        weight,
        out,
        len(columns),
        len(weight),
        rows.shape[1],
        rows.stride(0),
        weight.stride(0),
        GROUPS=groups,
        BLOCK_E=chosen.block_e,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
    )


def sparse_outer(
    row_ptr: Tensor, columns: Tensor, values: Tensor, rows: Tensor, out: Tensor
) -> None:
    """Writes out [F, D]; rows of rows are dense, all else is dense."""
    width, d = out.shape
    if not out.numel():
        return
    if not len(columns):
        out.zero_()
        return
    first, index, sorted_values = by_column(row_ptr, columns, values, width)
    # A chunk after the first one follows CHUNK entries, so there are no more of them than this.
    most = len(columns) // CHUNK
    extra = ((first.diff() - 1) // CHUNK).clamp(min=0)  # [F]: chunks of each column
    chunk = torch.cat([extra.new_zeros(1), extra.cumsum(0)])  # [F + 1]
    part = _alloc.empty((most, d), dtype=torch.float32, device=rows.device)
    chosen = launch_settings(d)
    tile = {"BLOCK_E": chosen.block_e, "BLOCK_D": chosen.block_d, "num_warps": chosen.warps}
    slices = triton.cdiv(d, chosen.block_d)
    if most:
        place = torch.arange(most, device=rows.device)
        owner = torch.searchsorted(chunk, place, right=True) - 1  # [C], F behind the last chunk
        _chunks_kernel[(most, slices)](
            first,
            chunk,
            owner,
            index,
            sorted_values,
            rows,
            part,
            len(rows),
            width,
            d,
            rows.stride(0),
            SIZE=CHUNK,
            **tile,
        )
    _outer_kernel[(width, slices)](
        first,
        chunk,
        index,
        sorted_values,
        rows,
        part,
        out,
        len(rows),
        d,
        rows.stride(0),
        SIZE=CHUNK,
        **tile,
    )


def sparse_column_sums(row_ptr: Tensor, columns: Tensor, values: Tensor, out: Tensor) -> None:
    """Writes out [F]; all is dense."""
    ones = torch.ones(1, 1, dtype=torch.float32, device=values.device)
    sparse_outer(row_ptr, columns, values, ones.expand(len(row_ptr) - 1, 1), out.unsqueeze(1))


def by_column(
    row_ptr: Tensor, columns: Tensor, values: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries in ascending order of columns and rows, without waiting for the device.

    Returns:
        int64 [F + 1], where the entries of each column begin; int64 [S], their rows; [S], their
        values.
    """
    slot = torch.arange(len(columns), device=columns.device)
    there = (columns >= 0) & (slot >= row_ptr[0]) & (slot < row_ptr[-1])
    key, order = torch.where(there, columns, width).sort(stable=True)
    place = torch.arange(width + 1, device=columns.device, dtype=key.dtype)
    first = torch.searchsorted(key, place)
    row = torch.searchsorted(row_ptr, order, right=True) - 1
    return first, row, values[order]
