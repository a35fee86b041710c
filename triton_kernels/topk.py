"""The k largest positive entries of each row in Triton.

Blocks of columns go by one after the other, and each row keeps a list of the first k of what it has
seen, in ascending order of columns. A block changes the list by one bisection over the orders of
both, so that x is read once, whatever is in it, and a matrix that is made block by block need not
exist. Equal entries stay in order, as a list holds smaller columns than the blocks behind.
"""

import torch
import triton
import triton.language as tl
from dreamreader.triton_kernels._selection import (
    FORMS,
    before,
    block_of,
    kth_order,
    load_order,
    size_of,
    warps_of,
    words,
)
from torch import Tensor

from dreamreader import _alloc

MAX_K = 1024  # entries of a list that a program instance holds


@triton.jit(do_not_specialize=["first", "k"])
def _merge_kernel(
    x_ptr,  # [N, W]
    old_order_ptr,  # [N, LIST]
    old_column_ptr,  # [N, LIST]
    order_ptr,  # [N, LIST]
    column_ptr,  # [N, LIST]
    kept_ptr,  # [N]
    width,
    first,
    k,
    stride,
    NEW: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TOP: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 2**31
    slot = tl.arange(0, LIST)
    order, column = load_order(
        x_ptr, x_ptr, row, 0, width, width, stride, False, BITS, INFINITY, NAN, BLOCK
    )  # [BLOCK]
    if NEW:
        old = tl.full([LIST], TOP, tl.int32)
        old_column = tl.full([LIST], -1, tl.int32)
    else:
        old = tl.load(old_order_ptr + row * LIST + slot)  # [LIST]
        old_column = tl.load(old_column_ptr + row * LIST + slot)
    # The k-th order of both is none behind the last one of a list that is full.
    full = tl.sum((old < TOP).to(tl.int32)) >= k
    high = tl.where(full, tl.max(tl.where(old < TOP, old, 0)), TOP - 1)
    low = tl.minimum(tl.minimum(tl.min(order), tl.min(old)), high)
    bound = kth_order(order, old, k, low, high)
    less = tl.sum((old < bound).to(tl.int32)) + tl.sum((order < bound).to(tl.int32))
    old_equal, equal = old == bound, order == bound
    ties = k - less
    old_kept = (old < bound) | (old_equal & (before(old_equal) < ties))
    more = ties - tl.sum(old_equal.to(tl.int32))
    kept = (order < bound) | (equal & (before(equal) < more))
    many = tl.sum(old_kept.to(tl.int32))
    at = row * LIST + before(old_kept)
    tl.store(order_ptr + at, old, mask=old_kept)
    tl.store(column_ptr + at, old_column, mask=old_kept)
    at = row * LIST + many + before(kept)
    tl.store(order_ptr + at, order, mask=kept)
    tl.store(column_ptr + at, first + column, mask=kept)
    many += tl.sum(kept.to(tl.int32))
    tl.store(order_ptr + row * LIST + slot, tl.full([LIST], TOP, tl.int32), mask=slot >= many)
    tl.store(kept_ptr + row, many)


@triton.jit(do_not_specialize=["rows", "k"])
def _emit_kernel(
    order_ptr,  # [N, LIST]
    list_ptr,  # [N, LIST]
    end_ptr,  # [N]
    value_ptr,  # [N K]
    row_ptr,  # [N + 1]
    column_ptr,  # [N K]
    rows,
    k,
    BITS: tl.constexpr,
    LIST: tl.constexpr,
):
    TOP: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, LIST)
    begin = tl.load(end_ptr + row - 1, mask=row > 0, other=0)
    end = tl.load(end_ptr + row)
    there = slot < end - begin
    order = tl.load(order_ptr + row * LIST + slot, mask=there, other=TOP)  # [LIST]
    column = tl.load(list_ptr + row * LIST + slot, mask=there, other=-1)
    tl.store(value_ptr + begin + slot, (TOP - order).to(value_ptr.dtype.element_ty), mask=there)
    tl.store(column_ptr + begin + slot, column, mask=there)
    tl.store(row_ptr + row, begin)
    tl.store(row_ptr + row + 1, end)
    # Slots of no entry: each row's share of what all rows left over.
    at = tl.load(end_ptr + rows - 1) + row * k - begin + slot
    tl.store(
        value_ptr + at, tl.zeros([LIST], value_ptr.dtype.element_ty), mask=slot < k - end + begin
    )
    tl.store(column_ptr + at, tl.full([LIST], -1, tl.int32), mask=slot < k - end + begin)


class RowLists:
    """The first k entries of each row, of blocks of columns that come in ascending order."""

    def __init__(self, x: Tensor, k: int) -> None:
        """x: of the type and device, with a row for each list."""
        self.form, self.k, self.rows = FORMS[x.dtype], k, len(x)
        self.size = size_of(k, 16, MAX_K)

        def empty(*shape: int) -> Tensor:
            return _alloc.empty(shape, dtype=torch.int32, device=x.device)

        self.lists = [(empty(self.rows, self.size), empty(self.rows, self.size)) for _ in "ab"]
        self.kept, self.new = empty(self.rows), True

    def add(self, x: Tensor, first: int) -> None:
        """Takes in columns `first` ... of all rows."""
        block = block_of(x.shape[1])
        for begin in range(0, x.shape[1], block):
            part = x[:, begin : begin + block]
            old, new = self.lists
            _merge_kernel[(self.rows,)](
                words(part),
                *old,
                *new,
                self.kept,
                part.shape[1],
                first + begin,
                self.k,
                part.stride(0),
                NEW=self.new,
                **self.form.constants(),
                LIST=self.size,
                BLOCK=block,
                num_warps=warps_of(block),
            )
            self.lists, self.new = [new, old], False

    def emit(self, values: Tensor, row_ptr: Tensor, columns: Tensor) -> None:
        """Writes the entries of all rows."""
        _emit_kernel[(self.rows,)](
            *self.lists[0],
            self.kept.cumsum(0, dtype=torch.int64),
            words(values),
            row_ptr,
            columns,
            self.rows,
            self.k,
            BITS=self.form.bits,
            LIST=self.size,
            num_warps=4,
        )


def supported(x: Tensor, k: int) -> bool:
    """Whether the kernels take a call: not float64, nor long lists."""
    return x.dtype in FORMS and k <= MAX_K


def topk(x: Tensor, k: int, values: Tensor, row_ptr: Tensor, columns: Tensor) -> None:
    """Writes the entries; rows of x are dense, there are N k slots, and at least one."""
    lists = RowLists(x, k)
    lists.add(x, 0)
    lists.emit(values, row_ptr, columns)
