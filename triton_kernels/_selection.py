"""What selections in Triton share: orders of values, blocks of them, and candidates.

The order of a value is an integer that rises where the value falls; TOP = 2^BITS - 1 stands for all
that is not positive. The K first of a selection are those of smallest order, equal ones by place.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST, BLOCK = 64, 4096  # entries of a row that a program instance holds


class Form(NamedTuple):
    """The bits of a type: how many say the order, and those of infinity and NaN."""

    bits: int
    infinity: int
    nan: int
    word: torch.dtype

    def constants(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {"BITS": self.bits, "INFINITY": self.infinity, "NAN": self.nan}


FORMS = {
    torch.bfloat16: Form(15, 0x7F80, 0x7FC0, torch.int16),
    torch.float16: Form(15, 0x7C00, 0x7E00, torch.int16),
    torch.float32: Form(31, 0x7F800000, 0x7FC00000, torch.int32),
}


def words(x: Tensor) -> Tensor:
    """The same memory as integers."""
    return x.view(FORMS[x.dtype].word)


def block_of(width: int) -> int:
    """Entries of a row that a program instance holds, for rows of this width."""
    return size_of(width, LEAST, BLOCK)


def size_of(count: int, least: int, most: int) -> int:
    """A length of vectors for this many: few different ones, as each is compiled by itself."""
    size = least
    while size < min(count, most):
        size = min(4 * size, most)
    return size


def warps_of(block: int) -> int:
    """Warps of a program instance: 16 entries or fewer for a thread."""
    return min(16, max(4, block // 512))


@triton.jit
def order_of(bits, BITS: tl.constexpr, INFINITY: tl.constexpr, NAN: tl.constexpr):
    """int32: the order of values with these bits, every NaN the same."""
    TOP: tl.constexpr = (1 << BITS) - 1
    signed = bits.to(tl.int32)
    return TOP - tl.where((signed & TOP) > INFINITY, NAN, tl.maximum(signed, 0))


@triton.jit
def load_order(
    x_ptr,  # [N, F]
    pool_ptr,  # [P]
    row,  # int64
    first,
    width,
    count,
    stride,
    POOL: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK], [BLOCK]: orders and columns of the entries `first` ... that take part in a row."""
    column = first + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < count
    if POOL:
        column = tl.load(pool_ptr + column, mask=inside, other=-1)
        inside = (column >= 0) & (column < width)
    bits = tl.load(x_ptr + row * stride + column, mask=inside, other=0)
    return order_of(bits, BITS, INFINITY, NAN), column


@triton.jit
def kth_order(order, other, rank, low, high):
    """The smallest of low ... high that `rank` orders of both do not exceed; high without one."""
    while low < high:
        middle = low + (high - low) // 2
        many = tl.sum((order <= middle).to(tl.int32)) + tl.sum((other <= middle).to(tl.int32))
        high = tl.where(many >= rank, middle, high)
        low = tl.where(many >= rank, low, middle + 1)
    return low


@triton.jit
def before(there):
    """int32: how many are there before each one."""
    here = there.to(tl.int32)
    return (tl.cumsum(here, 0) - here).to(tl.int32)
