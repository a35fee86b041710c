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
from dreamreader.triton_kernels._candidate_kernels import (
    append_kernel,
    bound_kernel,
    digit_kernel,
    guess_kernel,
    tally_kernel,
    write_kernel,
)
from dreamreader.triton_kernels._selection import FORMS, warps_of, words
from torch import Tensor

from dreamreader import _alloc

SAMPLE = 8192  # entries from which a guess is made
LIST = 256  # candidates that a program instance reads at once
TILES = 2048  # parts of rows that keep a GPU busy
BINS = 256  # of a digit


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
        guess_kernel[(1,)](
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
        append_kernel[(self.rows * here,)](
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
            digit_kernel[(tiles,)](
                *state, self.histogram, self.order, self.room, *sizes, DIGIT=digit, **fixed
            )
            self._again("digit", digit)
        everything, bound = not self.wanted, self._empty(torch.int64, 2)
        if not everything:
            bound_kernel[(1,)](
                self.histogram, bound, self.wanted, DIGITS=self.digits, BITS=self.form.bits
            )
        tally_kernel[(tiles,)](
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
        write_kernel[(tiles,)](
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
