"""The low-rank edit and its gradient in Triton.

A program instance owns a tile of BLOCK_T tokens of one entry of the batch and reads their channels
twice: for A x + b, and for what is added. The gradient does the same and leaves d and s z of every
row behind; a second kernel forms the sums of d x' and s z g' over the rows of each adapter. A
product of float32 is formed from three products of its halves in tf32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreamreader import _alloc

_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _rows(tokens, strength_ptr, strength_strides, BLOCK_T: tl.constexpr):
    """Entry, tokens [BLOCK_T] and their strengths, 0 where there is no token."""
    blocks = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)  # offsets exceed 2**31
    b = pid // blocks
    t = pid % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    s_ptrs = strength_ptr + b * strength_strides[0] + t * strength_strides[1]
    return b, t, tl.load(s_ptrs, mask=t < tokens, other=0.0)


@triton.jit
def _adapter(index_ptr, index_stride, b, adapters):
    """The adapter of an entry, and whether there is such a one (if not, the first is named)."""
    adapter = tl.load(index_ptr + b * index_stride)
    exists = (adapter >= 0) & (adapter < adapters)
    return tl.where(exists, adapter, 0), exists


@triton.jit
def _down(
    tile, x_stride, on, table, width, rank, R: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """[BT, R]: products of the rows that are `on` with a table [rank, width], 0 beyond rank."""
    j = tl.arange(0, R)  # [R]
    z = tl.zeros([BT, R], dtype=tl.float32)
    for begin in range(0, width, BD):
        d = begin + tl.arange(0, BD).to(tl.int64)  # [BD]
        x = tl.load(
            tile + d[None, :] * x_stride, mask=on[:, None] & (d < width)[None, :], other=0.0
        )
        a = tl.load(
            table + j[None, :] * width + d[:, None],
            mask=(j < rank)[None, :] & (d < width)[:, None],
            other=0.0,
        )  # [BD, R]
        z = tl.dot(x.to(tl.float32), a, z, input_precision=_PRECISION)
    return tl.where((j < rank)[None, :], z, 0.0)  # a row with inf makes NaN of the others


@triton.jit
def _up(
    tile,
    out_tile,
    x_stride,
    out_stride,
    there,
    on,
    s,
    z,
    table,
    width,
    rank,
    COPY: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """out = x + s z table in the rows that are `on`; with COPY, x in the others that are there."""
    j = tl.arange(0, R)  # [R]
    for begin in range(0, width, BD):
        d = begin + tl.arange(0, BD).to(tl.int64)  # [BD]
        inside = (there if COPY else on)[:, None] & (d < width)[None, :]
        x = tl.load(tile + d[None, :] * x_stride, mask=inside, other=0.0)  # [BT, BD]
        u = tl.load(
            table + j[:, None] * width + d[None, :],
            mask=(j < rank)[:, None] & (d < width)[None, :],
            other=0.0,
        )  # [R, BD]
        change = tl.dot(z, u, input_precision=_PRECISION)  # [BT, BD]
        y = (x.to(tl.float32) + s[:, None] * change).to(x.dtype)
        tl.store(out_tile + d[None, :] * out_stride, tl.where(on[:, None], y, x), mask=inside)


@triton.jit
def _low_rank_kernel(
    x_ptr,  # [B, T, D]
    out_ptr,  # [B, T, D], may be x
    down_ptr,  # [n, r, D]
    bias_ptr,  # [n, r]
    up_ptr,  # [n, r, D]
    strength_ptr,  # [B, T]
    index_ptr,  # [B]
    tokens,
    width,
    rank,
    adapters,
    x_strides,
    out_strides,
    strength_strides,
    index_stride,
    COPY: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, t, s = _rows(tokens, strength_ptr, strength_strides, BLOCK_T)
    on = s != 0  # [BLOCK_T]
    if not COPY:
        if tl.max(on.to(tl.int32), axis=0) == 0:
            return
    adapter, exists = _adapter(index_ptr, index_stride, b, adapters)
    tile = x_ptr + b * x_strides[0] + t[:, None] * x_strides[1]  # [BLOCK_T, 1]
    out_tile = out_ptr + b * out_strides[0] + t[:, None] * out_strides[1]
    table = adapter * rank * width
    # z = A x + b
    z = _down(
        tile, x_strides[2], on, down_ptr + table, width, rank, R, BLOCK_T, BLOCK_D
    )  # [BLOCK_T, R]
    j = tl.arange(0, R)
    z += tl.load(bias_ptr + adapter * rank + j, mask=j < rank, other=0.0)[None, :]
    z = tl.where(exists | (j >= rank)[None, :], z, float("nan"))
    on = on & (tl.max((z != 0).to(tl.int32), axis=1) != 0)
    # y = x + s U'z
    _up(
        tile,
        out_tile,
        x_strides[2],
        out_strides[2],
        t < tokens,
        on,
        s,
        z,
        up_ptr + table,
        width,
        rank,
        COPY,
        R,
        BLOCK_D,
    )


@triton.jit
def _low_rank_rows_kernel(
    grad_ptr,  # [B, T, D]
    x_ptr,  # [B, T, D]
    down_ptr,  # [n, r, D]
    bias_ptr,  # [n, r]
    up_ptr,  # [n, r, D]
    strength_ptr,  # [B, T]
    index_ptr,  # [B]
    dx_ptr,  # [B, T, D]
    d_strength_ptr,  # [B, T]
    d_ptr,  # [B, T, r]
    heard_ptr,  # [B, T, r]
    tokens,
    width,
    rank,
    adapters,
    grad_strides,
    x_strides,
    dx_strides,
    strength_strides,
    index_stride,
    HIDDEN: tl.constexpr,
    DX: tl.constexpr,
    DS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, t, s = _rows(tokens, strength_ptr, strength_strides, BLOCK_T)
    there = t < tokens
    on = s != 0  # [BLOCK_T]
    adapter, exists = _adapter(index_ptr, index_stride, b, adapters)
    g_tile = grad_ptr + b * grad_strides[0] + t[:, None] * grad_strides[1]  # [BLOCK_T, 1]
    j = tl.arange(0, R)
    row = b * tokens + t  # [BLOCK_T]
    table = adapter * rank * width
    # a = U g
    along = _down(g_tile, grad_strides[2], there, up_ptr + table, width, rank, R, BLOCK_T, BLOCK_D)
    along = tl.where(exists | (j >= rank)[None, :], along, float("nan"))  # [BLOCK_T, R]
    kept = on[:, None] & (j < rank)[None, :]
    tl.store(d_ptr + row[:, None] * rank + j[None, :], s[:, None] * along, mask=kept)
    if HIDDEN:
        # z = A x + b
        x_tile = x_ptr + b * x_strides[0] + t[:, None] * x_strides[1]
        z = _down(
            x_tile,
            x_strides[2],
            there if DS else on,
            down_ptr + table,
            width,
            rank,
            R,
            BLOCK_T,
            BLOCK_D,
        )
        z += tl.load(bias_ptr + adapter * rank + j, mask=j < rank, other=0.0)[None, :]
        tl.store(heard_ptr + row[:, None] * rank + j[None, :], s[:, None] * z, mask=kept)
        if DS:
            # ds = <a, z>
            tl.store(d_strength_ptr + row, tl.sum(along * z, axis=1), mask=there)
    if DX:
        # dx = g + s A'a
        dx_tile = dx_ptr + b * dx_strides[0] + t[:, None] * dx_strides[1]
        _up(
            g_tile,
            dx_tile,
            grad_strides[2],
            dx_strides[2],
            there,
            on,
            s,
            along,
            down_ptr + table,
            width,
            rank,
            True,
            R,
            BLOCK_D,
        )


@triton.jit
def _low_rank_sums_kernel(
    rows_ptr,  # [B, T, D]
    coefficients_ptr,  # [B, T, r]
    strength_ptr,  # [B, T]
    index_ptr,  # [B]
    table_ptr,  # [parts, n, r, D]
    bias_ptr,  # [parts, n, r]
    count,  # B T
    tokens,
    width,
    rank,
    adapters,
    rows_strides,
    strength_strides,
    index_stride,
    BIAS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    windows = tl.cdiv(width, BLOCK_D)
    adapter = tl.program_id(0).to(tl.int64) // windows
    d = tl.program_id(0) % windows * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    end = (part + 1) * count // parts
    j = tl.arange(0, R)
    total = tl.zeros([R, BLOCK_D], dtype=tl.float32)
    bias = tl.zeros([R], dtype=tl.float32)
    for begin in range(part * count // parts, end, BLOCK_T):
        row = begin + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        b = row // tokens
        t = row % tokens
        s_ptrs = strength_ptr + b * strength_strides[0] + t * strength_strides[1]
        s = tl.load(s_ptrs, mask=row < end, other=0.0)
        on = (s != 0) & (tl.load(index_ptr + b * index_stride, mask=row < end, other=-1) == adapter)
        c = tl.load(
            coefficients_ptr + row[None, :] * rank + j[:, None],
            mask=on[None, :] & (j < rank)[:, None],
            other=0.0,
        )  # [R, BLOCK_T]
        x = tl.load(
            rows_ptr
            + (b * rows_strides[0] + t * rows_strides[1])[:, None]
            + d[None, :] * rows_strides[2],
            mask=on[:, None] & (d < width)[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_D]
        total = tl.dot(c, x.to(tl.float32), total, input_precision=_PRECISION)
        bias += tl.sum(c, axis=1)
    at = (part * adapters + adapter) * rank + j  # [R]
    inside = (j < rank)[:, None] & (d < width)[None, :]
    tl.store(table_ptr + at[:, None] * width + d[None, :], total, mask=inside)
    if BIAS:
        if tl.program_id(0) % windows == 0:
            tl.store(bias_ptr + at, bias, mask=j < rank)


class Settings(NamedTuple):
    """Launch settings of one problem size."""

    r: int
    block_t: int
    block_d: int
    warps: int


def launch_settings(tokens: int, rank: int) -> Settings:
    """The tile of one program instance, such that no register spills."""
    r = max(16, triton.next_power_of_2(rank))
    block_t = min(32, max(16, triton.next_power_of_2(tokens)))
    return Settings(r, block_t, 64, 4) if r == 16 else Settings(r, block_t, 32, 8)


def parts_of(windows: int, rows: int) -> int:
    """Into how many parts the rows are cut so that the sums of all windows fill a GPU."""
    return max(1, min(16, triton.cdiv(rows, 256), triton.cdiv(512, windows)))


def low_rank(
    x: Tensor,
    out: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
) -> None:
    """Writes y = x + s U'(A x + b) to out [B, T, D], which may be x itself.

    Args:
        x, out, strength, index: any strides. down, bias, up: dense.
    """
    batch, tokens, width = x.shape
    if x.numel() == 0:
        return
    chosen = launch_settings(tokens, down.shape[1])
    _low_rank_kernel[(batch * triton.cdiv(tokens, chosen.block_t),)](
        x,
        out,
        down,
        bias,
        up,
        strength,
        index,
        tokens,
        width,
        down.shape[1],
        len(down),
        x.stride(),
        out.stride(),
        strength.stride(),
        index.stride(0),
        COPY=out is not x,
        R=chosen.r,
        BLOCK_T=chosen.block_t,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
        num_stages=1,  # loading ahead takes more registers than there are
    )


def low_rank_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
    dx: Tensor | None,
    d_down: Tensor | None,
    d_bias: Tensor | None,
    d_up: Tensor | None,
    d_strength: Tensor | None,
) -> None:
    """Writes the gradients that are not None; d_bias goes with d_down.

    Args:
        grad, x, dx, strength, index: any strides. The others: dense.
    """
    (batch, tokens, width), rank = x.shape, down.shape[1]
    chosen = launch_settings(tokens, rank)
    kept = [
        _alloc.empty((batch, tokens, rank), dtype=strength.dtype, device=x.device) for _ in range(2)
    ]
    _low_rank_rows_kernel[(batch * triton.cdiv(tokens, chosen.block_t),)](
        grad,
        x,
        down,
        bias,
        up,
        strength,
        index,
        grad if dx is None else dx,  # not written without DX
        strength if d_strength is None else d_strength,
        *kept,
        tokens,
        width,
        rank,
        len(down),
        grad.stride(),
        x.stride(),
        (grad if dx is None else dx).stride(),
        strength.stride(),
        index.stride(0),
        HIDDEN=d_up is not None or d_strength is not None,
        DX=dx is not None,
        DS=d_strength is not None,
        R=chosen.r,
        BLOCK_T=chosen.block_t,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
        num_stages=1,  # loading ahead takes more registers than there are
    )
    if d_down is not None:
        _sums(x, kept[0], strength, index, d_down, d_bias, chosen)
    if d_up is not None:
        _sums(grad, kept[1], strength, index, d_up, None, chosen)


def _sums(
    rows: Tensor,
    coefficients: Tensor,
    strength: Tensor,
    index: Tensor,
    table: Tensor,
    bias: Tensor | None,
    chosen: Settings,
) -> None:
    """Writes the sums over the rows of each adapter to table [n, r, D] and bias [n, r]."""
    batch, tokens, width = rows.shape
    adapters, rank = table.shape[:2]
    windows = adapters * triton.cdiv(width, chosen.block_d)
    parts = parts_of(windows, batch * tokens)
    results = [each for each in (table, bias) if each is not None]
    partial = [
        each if parts == 1 else torch.empty((parts, *each.shape), device=rows.device)
        for each in results
    ]
    _low_rank_sums_kernel[(windows, parts)](
        rows,
        coefficients,
        strength,
        index,
        partial[0],
        partial[-1],
        batch * tokens,
        tokens,
        width,
        rank,
        adapters,
        rows.stride(),
        strength.stride(),
        index.stride(0),
        BIAS=bias is not None,
        R=chosen.r,
        BLOCK_T=32,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
        num_stages=1,  # loading ahead takes more registers than there are
    )
    if parts > 1:
        for result, each in zip(results, partial, strict=True):
            torch.sum(each, 0, out=result)
