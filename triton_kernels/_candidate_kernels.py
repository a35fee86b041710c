"""The kernels of candidates: see `_candidates`, which launches them in the order of this file."""

import triton
import triton.language as tl
from dreamreader.triton_kernels._selection import before, kth_order, load_order, order_of


@triton.jit(do_not_specialize=["rows", "rank"])
def guess_kernel(
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
def append_kernel(
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
def bound_kernel(
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
def digit_kernel(
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
def tally_kernel(
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
def write_kernel(
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
