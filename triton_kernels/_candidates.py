"""Candidates of a selection in Triton: guessed, verified, refined, and written in order.

A guess of the K-th order says which entries are candidates; each block of a row appends its own to
one list in memory, and a table says where they are. The list holds the selection if it has room for
all of them and if there are K or more; that is a fact about counts, known on the device alone, and
every kernel behind asks it. If it holds, they read the list, of few times K entries; if not, the
matrix again. Either way the K-th order is found digit by digit from histograms of integers, and the
rank of an entry among those before it, in row-major order, is its slot. Where in the list a block's
candidates lie may differ between runs; what is written does not.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from dreamreader.triton_kernels._selection import (
    FORMS,
    before,
    kth_order,
    load_order,
    order_of,
    warps_of,
    words,
)
from torch import Tensor

from dreamreader import _alloc

SAMPLE = 8192  # entries from which a guess is made
LIST = 256  # candidates that a program instance reads at once
TILES = 2048  # parts of rows that keep a GPU busy
BINS = 256  # of a digit


@triton.jit(do_not_specialize=["rows", "rank"])
def _guess_kernel(
    x_ptr,  # [N, F]
    pool_ptr,  # [P]
    limit_ptr,  # []
    cursor_ptr,  # []
    histogram_ptr,  # [DIGITS, 256]
    rows,
    width,
    count,
    rank,
    stride,
    POOL: tl.constexpr,
    DIGITS: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    TOP: tl.constexpr = (1 << BITS) - 1
    # One entry from each of SAMPLE strata, at a place that a hash says; all where there are fewer.
    stratum = tl.arange(0, SAMPLE).to(tl.int64)  # [SAMPLE]
    size = (tl.full([], 0, tl.int64) + rows) * count
    begin = stratum * size // SAMPLE
    length = (stratum + 1) * size // SAMPLE - begin
    at = begin + ((stratum * 2654435761) & 0xFFFFFFFF) % tl.maximum(length, 1)
    inside = length > 0
    row, column = at // count, at % count
    if POOL:
        column = tl.load(pool_ptr + column, mask=inside, other=-1).to(tl.int64)
        inside = inside & (column >= 0) & (column < width)
    bits = tl.load(x_ptr + row * stride + column, mask=inside, other=0)
    order = order_of(bits, BITS, INFINITY, NAN)  # [SAMPLE]
    nothing = tl.full([16], TOP, tl.int32)
    low = tl.minimum(tl.min(order), TOP - 1)
    tl.store(limit_ptr, kth_order(order, nothing, rank, low, tl.full([], TOP - 1, tl.int32)) + 1)
    tl.store(cursor_ptr, tl.full([], 0, tl.int64))
    for digit in tl.static_range(DIGITS):
        place = histogram_ptr + digit * 256 + tl.arange(0, 256)
        tl.store(place, tl.zeros([256], tl.int64))


@triton.jit(do_not_specialize=["room", "first", "first_block", "here_blocks", "blocks"])
def _append_kernel(
    x_ptr,  # [N, W]
    pool_ptr,  # [P]
    limit_ptr,  # [] or [F]
    cursor_ptr,  # []
    place_ptr,  # [N, BLOCKS]
    many_ptr,  # [N, BLOCKS]
    order_ptr,  # [ROOM]
    column_ptr,  # [ROOM]
    room,
    width,
    count,
    first,
    first_block,
    here_blocks,
    blocks,
    stride,
    POOL: tl.constexpr,
    EACH: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    row, block = (number // here_blocks).to(tl.int64), number % here_blocks
    order, column = load_order(
        x_ptr,
        pool_ptr,
        row,
        block * BLOCK,
        width,
        count,
        stride,
        POOL,
        BITS,
        INFINITY,
        NAN,
        BLOCK,
    )  # [BLOCK]
    column += first
    if EACH:
        inside = (column >= first) & (column < first + width)
        limit = tl.load(limit_ptr + column, mask=inside, other=0)  # [BLOCK]
    else:
        limit = tl.load(limit_ptr)
    here = order < limit
    many = tl.sum(here.to(tl.int32))
    place = tl.atomic_add(cursor_ptr, many.to(tl.int64))
    table = row * blocks + first_block + block
    tl.store(place_ptr + table, place)
    tl.store(many_ptr + table, many)
    if (many > 0) & (place + many <= room):
        at = place + before(here)
        tl.store(order_ptr + at, order, mask=here)
        tl.store(column_ptr + at, column, mask=here)


@triton.jit
def holds(cursor_ptr, limit_ptr, room, wanted, TOP: tl.constexpr):
    """Whether the list has all candidates, and the selection is among them."""
    held = tl.load(cursor_ptr)
    return (held <= room) & ((held >= wanted) | (tl.load(limit_ptr) == TOP))


@triton.jit
def chosen(histogram_ptr, wanted, DIGITS: tl.constexpr, BITS: tl.constexpr):
    """int32, int64: the first digits of the K-th order, and how many of those with them are kept.

    With fewer than `wanted` in all: TOP and 0.
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    bins = tl.arange(0, 256)
    prefix, rank = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64) + wanted
    short = rank < 0
    for digit in tl.static_range(DIGITS):
        counts = tl.load(histogram_ptr + digit * 256 + bins)  # [256]
        upto = tl.cumsum(counts, 0)
        here = (upto >= rank) & (upto - counts < rank)
        short = short | (tl.sum(counts) < rank)
        prefix = (prefix << min(8, BITS - 8 * digit)) + tl.sum(tl.where(here, bins, 0))
        rank -= tl.sum(tl.where(here, upto - counts, 0))
    return tl.where(short, TOP, prefix), tl.where(short, 0, rank)


@triton.jit(do_not_specialize=["wanted"])
def _bound_kernel(
    histogram_ptr,  # [DIGITS, 256]
    bound_ptr,  # [2]: the K-th order, and how many of those with it are kept
    wanted,
    DIGITS: tl.constexpr,
    BITS: tl.constexpr,
):
    bound, ties = chosen(histogram_ptr, wanted, DIGITS, BITS)
    tl.store(bound_ptr, bound.to(tl.int64))
    tl.store(bound_ptr + 1, ties)


@triton.jit
def count_digits(histogram_ptr, order, prefix, DIGIT: tl.constexpr, BITS: tl.constexpr):
    """Adds the digits of orders that begin with `prefix` to their histogram."""
    TOP: tl.constexpr = (1 << BITS) - 1
    SHIFT: tl.constexpr = max(0, BITS - 8 * (DIGIT + 1))
    SIZE: tl.constexpr = min(8, BITS - 8 * DIGIT)
    digit = (order >> SHIFT) - (prefix << SIZE)
    there = (order < TOP) & (digit >= 0) & (digit < (1 << SIZE))
    counts = tl.histogram(tl.where(there, digit, 0), 256, mask=there)  # [256]
    place = histogram_ptr + DIGIT * 256 + tl.arange(0, 256)
    tl.atomic_add(place, counts.to(tl.int64), mask=counts > 0)


@triton.jit(do_not_specialize=["room", "wanted", "blocks", "parts", "per"])
def _digit_kernel(
    x_ptr,  # [N, F]
    pool_ptr,  # [P]
    limit_ptr,  # []
    cursor_ptr,  # []
    histogram_ptr,  # [DIGITS, 256]
    order_ptr,  # [ROOM]
    room,
    wanted,
    width,
    count,
    blocks,
    parts,
    per,
    stride,
    DIGIT: tl.constexpr,
    AGAIN: tl.constexpr,
    POOL: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
):
    TOP: tl.constexpr = (1 << BITS) - 1
    tile = tl.program_id(0).to(tl.int64)
    if holds(cursor_ptr, limit_ptr, room, wanted, TOP):
        held = tl.load(cursor_ptr)
        prefix, rank = chosen(histogram_ptr, wanted, DIGIT, BITS)
        for first in range(tile * LIST, held, LIST * tl.num_programs(0)):
            at = first + tl.arange(0, LIST)
            order = tl.load(order_ptr + at, mask=at < held, other=TOP)  # [LIST]
            count_digits(histogram_ptr, order, prefix, DIGIT, BITS)
    elif AGAIN:
        prefix, rank = chosen(histogram_ptr, wanted, DIGIT, BITS)
        row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
        for block in range(part * per, tl.minimum(part * per + per, blocks)):
            order, column = load_order(
                x_ptr,
                pool_ptr,
                row,
                block * BLOCK,
                width,
                count,
                stride,
                POOL,
                BITS,
                INFINITY,
                NAN,
                BLOCK,
            )
            count_digits(histogram_ptr, order, prefix, DIGIT, BITS)


@triton.jit(do_not_specialize=["room", "wanted", "blocks", "parts", "per"])
def _tally_kernel(
    x_ptr,  # [N, F]
    pool_ptr,  # [P]
    limit_ptr,  # []
    cursor_ptr,  # []
    bound_ptr,  # [2]
    place_ptr,  # [N, BLOCKS]
    many_ptr,  # [N, BLOCKS]
    order_ptr,  # [ROOM]
    tally_ptr,  # [2, N PARTS]
    room,
    wanted,
    width,
    count,
    blocks,
    parts,
    per,
    stride,
    ALL: tl.constexpr,
    AGAIN: tl.constexpr,
    POOL: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
):
    TOP: tl.constexpr = (1 << BITS) - 1
    tile = tl.program_id(0).to(tl.int64)
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    less, equal = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    if ALL:
        for block in range(part * per, tl.minimum(part * per + per, blocks)):
            less += tl.load(many_ptr + row * blocks + block)
    else:
        bound = tl.load(bound_ptr).to(tl.int32)
        if holds(cursor_ptr, limit_ptr, room, wanted, TOP):
            for block in range(part * per, tl.minimum(part * per + per, blocks)):
                place = tl.load(place_ptr + row * blocks + block)
                many = tl.load(many_ptr + row * blocks + block)
                for first in range(0, many, LIST):
                    at = first + tl.arange(0, LIST)
                    order = tl.load(order_ptr + place + at, mask=at < many, other=TOP)  # [LIST]
                    less += tl.sum((order < bound).to(tl.int32))
                    equal += tl.sum(((order == bound) & (order < TOP)).to(tl.int32))
        elif AGAIN:
            for block in range(part * per, tl.minimum(part * per + per, blocks)):
                order, column = load_order(
                    x_ptr,
                    pool_ptr,
                    row,
                    block * BLOCK,
                    width,
                    count,
                    stride,
                    POOL,
                    BITS,
                    INFINITY,
                    NAN,
                    BLOCK,
                )
                less += tl.sum((order < bound).to(tl.int32))
                equal += tl.sum(((order == bound) & (order < TOP)).to(tl.int32))
    tl.store(tally_ptr + tile, less)
    tl.store(tally_ptr + tl.num_programs(0) + tile, equal)


@triton.jit
def put(
    order,
    column,
    less,
    equal,
    bound,
    ties,
    slots,
    value_ptr,
    column_ptr,
    TOP: tl.constexpr,
):
    """Writes what is kept of a vector; int64, int64: how many are below and at the bound so far."""
    below, at_bound = order < bound, (order == bound) & (order < TOP)
    # Of those at the bound the first `ties` are kept, so that as many or all are before each.
    base = less + tl.minimum(equal, ties)
    left = tl.minimum(tl.maximum(ties - equal, 0), 1 << 30).to(tl.int32)
    free = tl.minimum(slots - base, 1 << 30).to(tl.int32)
    before_equal = before(at_bound)
    at = before(below) + tl.minimum(before_equal, left)
    kept = (below | (at_bound & (before_equal < left))) & (at < free)
    tl.store(value_ptr + base + at, (TOP - order).to(value_ptr.dtype.element_ty), mask=kept)
    tl.store(column_ptr + base + at, column, mask=kept)
    less += tl.sum(below.to(tl.int32))
    equal += tl.sum(at_bound.to(tl.int32))
    return less, equal


@triton.jit(do_not_specialize=["slots", "room", "wanted", "blocks", "parts", "per"])
def _write_kernel(
    x_ptr,  # [N, F]
    pool_ptr,  # [P]
    limit_ptr,  # []
    cursor_ptr,  # []
    bound_ptr,  # [2]
    place_ptr,  # [N, BLOCKS]
    many_ptr,  # [N, BLOCKS]
    order_ptr,  # [ROOM]
    list_ptr,  # [ROOM]
    end_ptr,  # [2, N PARTS]: tallies, summed
    value_ptr,  # [S]
    row_ptr,  # [N + 1]
    column_ptr,  # [S]
    threshold_ptr,  # []
    slots,
    room,
    wanted,
    width,
    count,
    blocks,
    parts,
    per,
    stride,
    ALL: tl.constexpr,
    AGAIN: tl.constexpr,
    POOL: tl.constexpr,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
):
    TOP: tl.constexpr = (1 << BITS) - 1
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    held = holds(cursor_ptr, limit_ptr, room, wanted, TOP)
    if ALL:
        bound, ties = tl.full([], TOP, tl.int32), tl.full([], 0, tl.int64)
    else:
        bound, ties = tl.load(bound_ptr).to(tl.int32), tl.load(bound_ptr + 1)
    less = tl.load(end_ptr + tile - 1, mask=tile > 0, other=0)
    equal = tl.load(end_ptr + tiles + tile - 1, mask=tile > 0, other=0)
    if part == 0:
        tl.store(row_ptr + row, less + tl.minimum(equal, ties))
    total = tl.load(end_ptr + tiles - 1) + tl.minimum(tl.load(end_ptr + 2 * tiles - 1), ties)
    if tile == tiles - 1:
        tl.store(row_ptr + row + 1, total)
        if not ALL:
            tl.store(threshold_ptr, (TOP - bound).to(threshold_ptr.dtype.element_ty))
    if held:
        for block in range(part * per, tl.minimum(part * per + per, blocks)):
            place = tl.load(place_ptr + row * blocks + block)
            many = tl.load(many_ptr + row * blocks + block)
            for first in range(0, many, LIST):
                at = first + tl.arange(0, LIST)
                order = tl.load(order_ptr + place + at, mask=at < many, other=TOP)  # [LIST]
                column = tl.load(list_ptr + place + at, mask=at < many, other=-1)
                less, equal = put(
                    order, column, less, equal, bound, ties, slots, value_ptr, column_ptr, TOP
                )
    elif AGAIN:
        for block in range(part * per, tl.minimum(part * per + per, blocks)):
            order, column = load_order(
                x_ptr,
                pool_ptr,
                row,
                block * BLOCK,
                width,
                count,
                stride,
                POOL,
                BITS,
                INFINITY,
                NAN,
                BLOCK,
            )
            less, equal = put(
                order, column, less, equal, bound, ties, slots, value_ptr, column_ptr, TOP
            )
    # Slots of no entry: all of them where a selection without a bound has too few.
    empty = total
    if ALL:
        empty = tl.where(held, total, 0)
    for first in range(empty + tile * LIST, slots, LIST * tiles):
        at = first + tl.arange(0, LIST)
        tl.store(value_ptr + at, tl.zeros([LIST], value_ptr.dtype.element_ty), mask=at < slots)
        tl.store(column_ptr + at, tl.full([LIST], -1, tl.int32), mask=at < slots)


def guess(wanted: int, size: int, margin: float, of: int | None = None) -> tuple[int, int]:
    """Which order of a sample to take as the guess, and room for the candidates it gives.

    The sample has about `hits` of the K first. The guess lies four standard deviations and a
    margin behind them; the room is for six more.

    Args:
        wanted: K, 1 or more.
        size: of the matrix.
        margin: by which the share of large entries in what is sampled may be wrong.
        of: how many entries the sample is drawn from, all by default.

    Returns:
        A rank in the sample, and a number of entries.
    """
    sample = min(SAMPLE, size if of is None else of)
    if sample == size:
        return wanted, size
    hits = wanted * sample / size
    rank = int(margin * hits + 4 * hits**0.5) + 2
    return rank, min(size, int(wanted * (rank + 6 * rank**0.5 + 6) / hits))


class Candidates:
    """The candidates of one selection, appended block by block.

    Attributes:
        limit: int32, orders below it are candidates: [], or [F] for each column.
        again: told of each pass that reads the list, for what must be done where it does not hold.
    """

    def __init__(
        self,
        x: Tensor,
        rows: int,
        count: int,
        block: int,
        room: int,
        wanted: int,
        limit: Tensor | None = None,
    ) -> None:
        """A list for rows of `count` columns that take part, in the type and on the device of x.

        Args:
            x: says which.
            rows: 1 or more.
            count: 1 or more.
            block: columns that a program instance holds.
            room: for candidates.
            wanted: K; 0 where all candidates are kept.
            limit: where it is no guess.
        """
        self.form, self.device, self.rows, self.count = FORMS[x.dtype], x.device, rows, count
        self.block, self.blocks = block, triton.cdiv(count, block)
        parts = min(self.blocks, triton.cdiv(TILES, rows))
        self.per = triton.cdiv(self.blocks, parts)  # blocks of a part of a row
        self.parts = triton.cdiv(self.blocks, self.per)
        self.room, self.wanted = room, wanted
        self.digits = triton.cdiv(self.form.bits, 8) if wanted else 0
        self.limit = self._empty(torch.int32) if limit is None else limit
        self.cursor = self._empty(torch.int64)
        self.histogram = self._empty(torch.int64, max(1, self.digits), BINS)
        if not wanted:
            self.cursor.zero_()
        self.place = self._empty(torch.int64, rows, self.blocks)
        self.many = self._empty(torch.int32, rows, self.blocks)
        self.order, self.column = (self._empty(torch.int32, max(1, room)) for _ in "ab")
        self.again: Callable[..., None] | None = None

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return _alloc.empty(shape, dtype=dtype, device=self.device)

    def guess(self, x: Tensor, rank: int, pool: Tensor | None = None) -> None:
        """Makes the guess from a sample of x."""
        count = x.shape[1] if pool is None else len(pool)
        _guess_kernel[(1,)](
            words(x),
            self.limit if pool is None else pool,
            self.limit,
            self.cursor,
            self.histogram,
            x.shape[0],
            x.shape[1],
            count,
            rank,
            x.stride(0),
            POOL=pool is not None,
            DIGITS=self.digits,
            **self.form.constants(),
            SAMPLE=SAMPLE,
            num_warps=16,
        )

    def append(self, x: Tensor, first: int = 0, pool: Tensor | None = None) -> None:
        """Adds the candidates of columns `first` ..., a multiple of the block, of all rows."""
        count = x.shape[1] if pool is None else len(pool)
        here = triton.cdiv(count, self.block)
        _append_kernel[(self.rows * here,)](
            words(x),
            self.limit if pool is None else pool,
            self.limit,
            self.cursor,
            self.place,
            self.many,
            self.order,
            self.column,
            self.room,
            x.shape[1],
            count,
            first,
            first // self.block,
            here,
            self.blocks,
            x.stride(0),
            POOL=pool is not None,
            EACH=self.limit.dim() > 0,
            **self.form.constants(),
            BLOCK=self.block,
            num_warps=warps_of(self.block),
        )

    def write(
        self,
        x: Tensor | None,
        pool: Tensor | None,
        values: Tensor,
        row_ptr: Tensor,
        columns: Tensor,
        threshold: Tensor | None = None,
    ) -> None:
        """Finds the bound and writes what is kept; x is read again where the list does not hold."""
        source = self.order if x is None else words(x)
        state = source, self.limit if pool is None else pool, self.limit, self.cursor
        width, stride = (0, 0) if x is None else (x.shape[1], x.stride(0))
        sizes = self.wanted, width, self.count, self.blocks, self.parts, self.per, stride
        fixed: dict[str, Any] = {
            "AGAIN": x is not None,
            "POOL": pool is not None,
            **self.form.constants(),
            "BLOCK": self.block,
            "LIST": LIST,
            "num_warps": 4 if x is None else warps_of(self.block),
        }
        tiles = self.rows * self.parts
        tally = self._empty(torch.int32, 2, tiles)
        lists = self.place, self.many, self.order
        for digit in range(self.digits):
            _digit_kernel[(tiles,)](
                *state, self.histogram, self.order, self.room, *sizes, DIGIT=digit, **fixed
            )
            self._again("digit", digit)
        everything, bound = not self.wanted, self._empty(torch.int64, 2)
        if not everything:
            _bound_kernel[(1,)](
                self.histogram, bound, self.wanted, DIGITS=self.digits, BITS=self.form.bits
            )
        _tally_kernel[(tiles,)](
            *state, bound, *lists, tally, self.room, *sizes, ALL=everything, **fixed
        )
        self._again("tally", bound, tally)
        end = tally.cumsum(1, dtype=torch.int64)
        slots = len(columns)
        out = (
            words(values),
            row_ptr,
            columns,
            self.cursor if threshold is None else words(threshold),
        )
        _write_kernel[(tiles,)](
            *state,
            bound,
            *lists,
            self.column,
            end,
            *out,
            slots,
            self.room,
            *sizes,
            ALL=everything,
            **fixed,
        )
        self._again("write", bound, end, *out[:1], columns)

    def _again(self, *what: Any) -> None:
        if self.again is not None:
            self.again(*what)
