"""The encoder of a sparse autoencoder and its selection in Triton, by blocks of columns.

cuBLAS makes a block of activations that stays in the second cache, and a kernel takes from it what
may be selected: rows by their lists (see `topk`), all rows together by candidates of a guess, or
what is above a threshold. [N, F] never exists.

The guess comes from every eighth row and latent. Where counts show that it was wrong, kernels that
else return at once make the activations again, tile by tile in registers, and select from them;
the host does not know which of the two it was. The activations of a call are those of cuBLAS or
those of these kernels, never some of both.
"""

from typing import Any

import triton
import triton.language as tl
from dreamreader.triton_kernels._candidate_kernels import chosen, count_digits, holds
from dreamreader.triton_kernels._candidates import Candidates, guess
from dreamreader.triton_kernels._selection import BLOCK, FORMS, block_of, order_of
from dreamreader.triton_kernels.threshold_select import limits
from dreamreader.triton_kernels.topk import MAX_K, RowLists
from torch import Tensor

BYTES = 32 << 20  # of the activations that exist at once: they fit the second cache
LEAST = 1024  # columns of a block, for products that fill a GPU
MARGIN = 1.5  # candidates beyond K that are wanted: a sample of rows is less sure than one of all
TILE = (64, 64, 32)  # rows, columns and features of a tile

WARPS = 8  # of a tile


@triton.jit
def encode_order(
    x_ptr,  # [N, D]
    weight_ptr,  # [F, D]
    bias_ptr,  # [F]
    row,  # [ROWS] int64
    column,  # [COLUMNS]
    rows,
    width,
    d,
    x_stride,
    weight_stride,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """[ROWS, COLUMNS]: orders of activations, TOP outside of the matrix."""
    TOP: tl.constexpr = (1 << BITS) - 1
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    there = (row < rows)[:, None]
    taken = (column < width)[:, None]
    for first in range(0, d, FEATURES):
        feature = first + tl.arange(0, FEATURES)  # [FEATURES]
        inside = (feature < d)[None, :]
        x = tl.load(
            x_ptr + row[:, None] * x_stride + feature[None, :], mask=there & inside, other=0.0
        )  # [ROWS, FEATURES]
        weight = tl.load(
            weight_ptr + column[:, None].to(tl.int64) * weight_stride + feature[None, :],
            mask=taken & inside,
            other=0.0,
        )  # [COLUMNS, FEATURES]
        if WIDEN:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    # a = x W' + b, rounded to the type of x
    a = total.to(x_ptr.dtype.element_ty)
    if BITS == 15:
        order = order_of(a.to(tl.int16, bitcast=True), BITS, INFINITY, NAN)
    else:
        order = order_of(a.to(tl.int32, bitcast=True), BITS, INFINITY, NAN)
    return tl.where(there & (column < width)[None, :], order, TOP)


@triton.jit(do_not_specialize=["slots", "room", "wanted", "rows", "parts", "per"])
def _again_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [F, D]
    bias_ptr,  # [F]
    limit_ptr,  # []
    cursor_ptr,  # []
    histogram_ptr,  # [DIGITS, 256]
    bound_ptr,  # [2]
    tally_ptr,  # [2, N PARTS]: tallies, or for writing their sums
    value_ptr,  # [S]
    column_ptr,  # [S]
    slots,
    room,
    wanted,
    rows,
    width,
    d,
    parts,
    per,  # columns of a part
    x_stride,
    weight_stride,
    WHAT: tl.constexpr,  # a digit, then the tallies, then what is kept
    DIGITS: tl.constexpr,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    TOP: tl.constexpr = (1 << BITS) - 1
    if not holds(cursor_ptr, limit_ptr, room, wanted, TOP):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        part = tl.program_id(1)
        tiles = tl.full([], 0, tl.int64) + rows * parts
        tile = row * parts + part
        less, equal = tl.zeros([ROWS], tl.int64), tl.zeros([ROWS], tl.int64)
        if WHAT < DIGITS:
            prefix, rank = chosen(histogram_ptr, wanted, WHAT, BITS)
        else:
            bound, ties = tl.load(bound_ptr).to(tl.int32), tl.load(bound_ptr + 1)
        if WHAT == DIGITS + 1:
            earlier = (row < rows) & (tile > 0)
            less = tl.load(tally_ptr + tile - 1, mask=earlier, other=0)
            equal = tl.load(tally_ptr + tiles + tile - 1, mask=earlier, other=0)
        for first in range(part * per, tl.minimum(part * per + per, width), COLUMNS):
            column = first + tl.arange(0, COLUMNS)  # [COLUMNS]
            order = encode_order(
                x_ptr,
                weight_ptr,
                bias_ptr,
                row,
                column,
                rows,
                width,
                d,
                x_stride,
                weight_stride,
                BIAS,
                WIDEN,
                BITS,
                INFINITY,
                NAN,
                ROWS,
                COLUMNS,
                FEATURES,
            )  # [ROWS, COLUMNS]
            if WHAT < DIGITS:
                flat = tl.reshape(order, [ROWS * COLUMNS])
                count_digits(histogram_ptr, flat, prefix, WHAT, BITS)
            else:
                below = (order < bound).to(tl.int32)
                at_bound = ((order == bound) & (order < TOP)).to(tl.int32)
                if WHAT == DIGITS + 1:
                    base = (less + tl.minimum(equal, ties))[:, None]  # [ROWS, 1]
                    left = tl.minimum(tl.maximum(ties - equal, 0), 1 << 30).to(tl.int32)[:, None]
                    free = tl.minimum(slots - base, 1 << 30).to(tl.int32)
                    before_equal = (tl.cumsum(at_bound, 1) - at_bound).to(tl.int32)
                    at = (tl.cumsum(below, 1) - below).to(tl.int32) + tl.minimum(before_equal, left)
                    kept = (below > 0) | ((at_bound > 0) & (before_equal < left))
                    kept = kept & (at < free)
                    value = (TOP - order).to(value_ptr.dtype.element_ty)
                    tl.store(value_ptr + base + at, value, mask=kept)
                    tl.store(
                        column_ptr + base + at,
                        tl.broadcast_to(column[None, :], at.shape),
                        mask=kept,
                    )
                less += tl.sum(below, axis=1)
                equal += tl.sum(at_bound, axis=1)
        if WHAT == DIGITS:
            tl.store(tally_ptr + tile, less.to(tl.int32), mask=row < rows)
            tl.store(tally_ptr + tiles + tile, equal.to(tl.int32), mask=row < rows)


def supported(x: Tensor, rule: str, count: int) -> bool:
    """Whether the kernels take a call: not float64, nor long lists of rows."""
    return x.dtype in FORMS and (rule != "topk" or count <= MAX_K)


def columns_of(rows: int, width: int, size: int) -> tuple[int, int]:
    """Columns of a block of activations of `size` bytes, and of what a program instance holds."""
    step = max(LEAST, BYTES // (rows * size))
    if width <= step:
        return width, block_of(width)
    block = BLOCK
    while block > step:
        block //= 4
    return step // block * block, block


class Again:
    """Makes the activations again, and selects from them, where the candidates do not hold."""

    def __init__(self, found: Candidates, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.found, self.operands = found, (x, weight, bias)

    def __call__(self, what: str, bound: Any, tally: Any = None, *out: Tensor) -> None:
        """One pass: of a digit (`bound` is its number), of the tallies, or what is kept."""
        (x, weight, bias), found = self.operands, self.found
        digit = bound if what == "digit" else found.digits + (what == "write")
        state = found.limit if what == "digit" else bound
        values, columns = out or (found.order, found.column)
        rows, columns_, features = TILE
        _again_kernel[(triton.cdiv(len(x), rows), found.parts)](
            x,
            weight,
            weight if bias is None else bias,  # not read without one
            found.limit,
            found.cursor,
            found.histogram,
            state,
            found.limit if tally is None else tally,
            values,
            columns,
            len(columns),
            found.room,
            found.wanted,
            len(x),
            len(weight),
            x.shape[1],
            found.parts,
            found.per * found.block,
            x.stride(0),
            weight.stride(0),
            WHAT=digit,
            DIGITS=found.digits,
            BIAS=bias is not None,
            WIDEN=bool(triton.knobs.runtime.interpret),  # whose product takes bfloat16 for integers
            **found.form.constants(),
            ROWS=rows,
            COLUMNS=columns_,
            FEATURES=features,
            num_warps=WARPS,
        )


class BlockSelector:
    """What is kept of activations that come block by block, in ascending order of columns."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: str,
        count: int,
        threshold: Tensor | None,
        slots: int,
        some: Tensor | None,
    ) -> None:
        """A selection for the activations of x, of which there are none yet.

        Args:
            x: [N, D], not empty. weight: [F, D], not empty; rows of both are dense.
            bias: [F], dense.
            rule: topk, batch_topk or threshold.
            count: k or K, at least 1 and at most what there is.
            threshold: of the rule threshold.
            slots: of the result.
            some: of the rule batch_topk: some of the activations, for a guess.
        """
        rows, width = len(x), len(weight)
        self.lists = RowLists(x, count) if rule == "topk" else None
        if rule == "topk":
            return
        _, block = columns_of(rows, width, x.element_size())
        if some is None:
            assert threshold is not None
            limit = limits(threshold, x.dtype)
            self.found = Candidates(x, rows, width, block, slots, 0, limit)
            return
        rank, room = guess(count, rows * width, MARGIN, some.numel())
        self.found = Candidates(x, rows, width, block, room, count)
        self.found.guess(some, rank)
        self.found.again = Again(self.found, x, weight, bias)

    def add(self, block: Tensor, first: int) -> None:
        """Takes in the activations of columns `first` ...; they are not needed afterwards."""
        if self.lists is not None:
            self.lists.add(block, first)
        else:
            self.found.append(block, first)

    def emit(self, values: Tensor, row_ptr: Tensor, columns: Tensor, smallest: Tensor) -> None:
        """Writes what is kept; the smallest value only for batch_topk."""
        if self.lists is not None:
            self.lists.emit(values, row_ptr, columns)
        else:
            bounded = smallest if self.found.wanted else None
            self.found.write(None, None, values, row_ptr, columns, bounded)
