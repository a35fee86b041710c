"""Sums over the rows of columns in Triton, in float64 and in a fixed order.

A program instance sums a part of the rows of BLOCK columns; the parts are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreamreader import _alloc

BLOCK = 64  # columns of a program instance
STEP = 16  # rows that are in flight together
PARTS = 64  # of the rows, at most


@triton.jit(do_not_specialize=["rows", "per"])
def _sums_kernel(
    x_ptr,  # [N, F]
    part_ptr,  # [2, PARTS, F]
    rows,
    width,
    per,
    stride,
    ENTROPY: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    first_sum = tl.zeros([BLOCK], tl.float64)
    second_sum = tl.zeros([BLOCK], tl.float64)
    for first in range(part * per, tl.minimum(part * per + per, rows), STEP):
        row = first + tl.arange(0, STEP)  # [STEP]
        inside = (row < tl.minimum(part * per + per, rows))[:, None] & (column < width)[None, :]
        x = tl.load(
            x_ptr + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0
        ).to(tl.float32)  # [STEP, BLOCK]
        a = tl.where((x > 0) | (x != x), x, 0.0).to(tl.float64)
        if ENTROPY:
            # S = sum a and T = sum a log a: where one a is all of S, log S - T / S takes all digits
            first_sum += tl.sum(a, axis=0)
            second_sum += tl.sum(tl.where(a > 0, a * tl.log(tl.where(a > 0, a, 1.0)), 0.0), axis=0)
        else:
            first_sum += tl.sum(a * a, axis=0)
    place = part_ptr + part.to(tl.int64) * width + column
    tl.store(place, first_sum, mask=column < width)
    if ENTROPY:
        place += tl.num_programs(1).to(tl.int64) * width
        tl.store(place, second_sum, mask=column < width)


def supported(x: Tensor) -> bool:
    """Whether the kernel takes a call: not float64."""
    return x.dtype != torch.float64


def column_scores(x: Tensor, score: str, out: Tensor) -> None:
    """Writes out [F]; rows of x are dense."""
    rows, width = x.shape
    if not width:
        return
    entropy = score.startswith("entropy")
    per = max(STEP, triton.cdiv(rows, PARTS))
    parts = max(1, triton.cdiv(rows, per))
    sums = _alloc.empty((1 + entropy, parts, width), dtype=torch.float64, device=x.device)
    _sums_kernel[(triton.cdiv(width, BLOCK), parts)](
        x,
        sums,
        rows,
        width,
        per,
        x.stride(0),
        ENTROPY=entropy,
        STEP=STEP,
        BLOCK=BLOCK,
        num_warps=4,
    )
    total = sums.sum(1)  # [1 or 2, F]
    if not entropy:
        out.copy_(total[0].sqrt() if score == "l2" else total[0])
        return
    found = total[0].log() - total[1] / total[0]
    found = found if score == "entropy" else 1 / (1 + found)
    out.copy_(torch.where(total[0] == 0, 0.0, found))
