"""Which rows of a store are read, and where they are: runs of rows, cut down to chosen tokens."""

import hashlib
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from dreamreader.errors import InvalidInput
from dreamreader.store.rows import Segments

TOKENS = slice | range | int | Iterable[int]
_PIECE = 256  # rows of which the wanted ones are counted together: 0.1 byte of memory for a row
_ANY = 2**31  # above every token


@dataclass(frozen=True)
class TokenFilter:
    """Which tokens: every `every`-th of begin .. begin + span - 1, or those that the table marks.

    Attributes:
        table: empty, or a byte for each of the span: 1 where the token is wanted.
    """

    begin: int
    span: int
    every: int = 1
    table: bytes = b""

    def is_wanted(self, token: Int[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
        """Whether each token is one of them."""
        at = token.astype(np.int64) - self.begin
        inside = (at >= 0) & (at < self.span)
        if not self.table:
            return inside & (at % self.every == 0)
        return inside & (np.frombuffer(self.table, np.uint8)[at.clip(0, self.span - 1)] == 1)


def tokens_of(chosen: TOKENS) -> TokenFilter:
    """Reads what a user gives for `tokens`.

    Raises:
        InvalidInput: it is empty, has a negative number, or no numbers.
    """
    if isinstance(chosen, slice):
        begin, stop, every = (
            default if each is None else each
            for each, default in zip(
                (chosen.start, chosen.stop, chosen.step), (0, _ANY, 1), strict=True
            )
        )
        if begin < 0 or stop <= begin or every < 1:
            raise InvalidInput(
                f"tokens: {chosen} must count forward from 0 and have a token: how many there are "
                "may differ from row to row"
            )
        return TokenFilter(begin, stop - begin, every)
    try:
        given = [chosen] if isinstance(chosen, int) else list(chosen)
        numbers = sorted({operator.index(each) for each in given})
        if any(isinstance(each, bool) for each in given):
            raise TypeError
    except TypeError:
        raise InvalidInput(
            f"tokens: a number, a slice, a range or several numbers, got {chosen!r}"
        ) from None
    if not numbers or numbers[0] < 0:
        raise InvalidInput(f"tokens: one or more numbers from 0 on, got {chosen!r}")
    table = np.zeros(numbers[-1] - numbers[0] + 1, np.uint8)
    table[np.array(numbers) - numbers[0]] = 1
    return TokenFilter(numbers[0], len(table), table=table.tobytes())


@dataclass(frozen=True)
class Picked:
    """Runs of rows within files, and how many rows of each are wanted.

    Attributes:
        segments: whose rows. tokens: which of them, all where it is None.
        file: place in `segments.files` of each run. first, rows: where it starts, and its length.
        start: [runs + 1], wanted rows before each run; the last number is that of all.
    """

    segments: Segments
    tokens: TokenFilter | None
    file: Int[np.ndarray, " runs"]
    first: Int[np.ndarray, " runs"]
    rows: Int[np.ndarray, " runs"]
    start: Int[np.ndarray, " runs+1"]

    @property
    def total(self) -> int:
        """How many rows are wanted."""
        return int(self.start[-1])

    def digest(self) -> str:
        """Names these rows: the same for the same units, also in another folder."""
        found = hashlib.sha256(self.segments.site.name.encode())
        for name in self.segments.files:
            found.update(Path(name).parent.name.encode() + b"/")
        for each in (self.file, self.first, self.rows, self.start):
            found.update(each.astype("<i8").tobytes())
        found.update(repr(self.tokens).encode())
        return found.hexdigest()[:16]

    def runs_of(
        self, places: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The run of each place among the wanted rows, and its place among those of the run."""
        run = np.searchsorted(self.start, places, side="right") - 1
        return run, places - self.start[run]

    def keep_counted(self, wanted: Int[np.ndarray, " runs"]) -> "Picked":
        """The runs that have wanted rows, of which so many are wanted."""
        some = wanted > 0
        return Picked(
            self.segments,
            self.tokens,
            self.file[some],
            self.first[some],
            self.rows[some],
            _starts(wanted[some]),
        )


def pick_rows(segments: Segments, tokens: TokenFilter | None = None) -> Picked:
    """All rows of segments; where tokens are chosen, in runs that are to be counted."""
    file, first, rows = (
        np.ascontiguousarray(each, kind)
        for each, kind in (
            (segments.file, np.int32),
            (segments.first, np.int64),
            (segments.rows, np.int64),
        )
    )
    if tokens is not None:
        pieces = -(-rows // _PIECE)
        number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
        file, first = np.repeat(file, pieces), np.repeat(first, pieces) + number * _PIECE
        rows = np.minimum(np.repeat(rows, pieces) - number * _PIECE, _PIECE)
    return Picked(segments, tokens, file, first, rows, _starts(rows))


def _starts(rows: Int[np.ndarray, " runs"]) -> Int[np.ndarray, " runs+1"]:
    return np.concatenate([[0], rows.cumsum()]).astype(np.int64)
