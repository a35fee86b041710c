"""Reading one shard: its header and tables at once, its rows as they are asked for."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from dreamreader.errors import InvalidInput
from dreamreader.store.checksum import crc32c
from dreamreader.store.layout import (
    HEADER,
    KEYS,
    MOMENTS,
    SEGMENTS,
    SiteLayout,
    Tensors,
    check_format,
    site_from,
    tensors_of,
)
from dreamreader.store.unit import Unit, crc32c_of, read_unit

ADVICE = "; run `dreamreader store verify`"


@dataclass(frozen=True)
class ShardFile:
    """A shard on disk.

    Attributes:
        path: of the file. site: whose rows it has. run: digest of the fingerprint.
        branches: names that the keys' branch numbers stand for.
        rows: how many there are. at: where its tensors are.
        segments: runs of rows, columns SEGMENTS. moments: when rows were taken, columns MOMENTS.
    """

    path: Path
    site: SiteLayout
    run: str
    branches: tuple[str, ...]
    rows: int
    at: Tensors
    segments: Int[np.ndarray, "segments 4"]
    moments: Float[np.ndarray, "moments 7"]

    @cached_property
    def values(self) -> "Column":
        """UInt8 [rows, bytes]: the rows as bytes."""
        return self._column(self.at.values, "u1", (self.site.row_bytes,))

    @cached_property
    def keys(self) -> "Column":
        """Int32 [rows, 4]: columns KEYS."""
        return self._column(self.at.keys, "<i4", (len(KEYS),))

    @cached_property
    def scales(self) -> "Column | None":
        """Float32 [rows]: what stored values are multiplied with; None where that is nothing."""
        return self._column(self.at.scales, "<f4", ()) if self.site.scaled else None

    @cached_property
    def checksums(self) -> "Column":
        """UInt32 [rows]: CRC-32C of each row."""
        return self._column(self.at.checksums, "<u4", ())

    def check_rows(
        self,
        places: Int[np.ndarray, " n"],
        values: UInt8[np.ndarray, "n bytes"],
        keys: Int[np.ndarray, "n 4"],
        scales: Float[np.ndarray, " n"] | None,
    ) -> None:
        """Compares rows that were read with their checksums.

        Raises:
            InvalidInput: one differs; says which.
        """
        parts = [values, keys.view(np.uint8)]
        parts += [] if scales is None else [scales[:, None].view(np.uint8)]
        wrong = places[crc32c(*parts) != self.checksums[places]] if len(places) else places
        if len(wrong):
            raise damaged_row(self.path, int(wrong[0]))

    def _column(self, start: int, dtype: str, shape: tuple[int, ...]) -> "Column":
        return Column(self.path, self.at.bytes, start, np.dtype((dtype, shape)), self.rows)


@dataclass(frozen=True)
class Column:
    """One tensor of a shard, whose rows are read when they are asked for.

    They are read, not mapped: to touch what a mapped file has lost would end the process.

    Attributes:
        path: of the shard. whole: bytes that it has. start: first byte of the tensor.
        row: dtype of one row, with its shape. rows: how many there are.
    """

    path: Path
    whole: int
    start: int
    row: np.dtype
    rows: int

    def __getitem__(self, where: "slice | Int[np.ndarray, ' n']") -> np.ndarray:
        """The rows of a slice without step, or of places in any order.

        Raises:
            InvalidInput: the file is missing or has lost bytes.
        """
        if isinstance(where, slice):
            first, stop, _ = where.indices(self.rows)
            runs, back = [range(first, max(stop, first))], None
        else:
            places, back = np.unique(where, return_inverse=True)
            parts = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
            runs = [range(each[0], each[-1] + 1) for each in parts if len(each)]
        size = self.row.itemsize
        out = np.empty(sum(map(len, runs)) * size, np.uint8)
        with open_file(self.path, self.whole) as file:
            done = 0
            for run in runs:
                stop = done + len(run) * size
                read_into(file, self.start + run.start * size, out[done:stop], self.whole)
                done = stop
        found = out.view(self.row.base).reshape(-1, *self.row.shape)
        return found if back is None else found[back]


@contextmanager
def open_file(path: Path, whole: int) -> Iterator[FileIO]:
    """A shard for reading, as long as it has all of its bytes.

    Raises:
        InvalidInput: it is missing, cannot be opened or has lost bytes.
    """
    try:
        file = open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise InvalidInput(f"{path} is missing{ADVICE}") from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be opened: {error.strerror}{ADVICE}") from error
    with file:
        _check_size(file, whole)
        yield file


def read_into(file: FileIO, start: int, out: UInt8[np.ndarray, " n"], whole: int) -> None:
    """Fills `out` with the bytes of a file from `start`.

    Raises:
        InvalidInput: the file, of `whole` bytes, has lost some, or cannot be read.
    """
    try:
        file.seek(start)
        left = memoryview(out)  # pyright: ignore[reportArgumentType]
        while left:
            if not (count := file.readinto(left)):
                _check_size(file, whole)
                raise InvalidInput(f"{file.name} changes while it is read")
            left = left[count:]
    except OSError as error:
        raise InvalidInput(f"{file.name} cannot be read: {error.strerror}{ADVICE}") from error


def _check_size(file: FileIO, whole: int) -> None:
    size = os.fstat(file.fileno()).st_size
    if size < whole:
        raise InvalidInput(f"{file.name} has {size:,} bytes, its rows need {whole:,}{ADVICE}")


def damaged_row(file: str | Path, row: int) -> InvalidInput:
    """The error for a row whose checksum is not the one that was written with it."""
    return InvalidInput(f"{file}: row {row} is damaged, its checksum is wrong{ADVICE}")


def open_shard(path: Path, unit: Unit | None = None) -> ShardFile:
    """Reads the header and the tables of a shard, none of its rows.

    Args:
        path: of the shard. unit: what unit.json beside it says; read from there by default.

    Raises:
        InvalidInput: it is missing, truncated or damaged, of a newer format, or not as its unit
            says.
    """
    unit = unit or read_unit(path.parent)
    listed = unit.shards.get(path.name)
    if listed is None:
        raise InvalidInput(f"{path} is no shard of its unit: unit.json does not list it")
    at = tensors_of(listed.site, listed.rows, listed.segments, listed.moments)
    try:
        with open(path, "rb", buffering=0) as file:
            if (size := file.seek(0, 2)) != at.bytes:
                raise InvalidInput(f"{path} has {size:,} bytes, was written with {at.bytes:,}")
            head, tables = np.empty(HEADER, np.uint8), np.empty(at.bytes - at.segments, np.uint8)
            read_into(file, 0, head, at.bytes)
            read_into(file, at.segments, tables, at.bytes)
    except FileNotFoundError:
        raise InvalidInput(f"{path} is missing") from None
    if crc32c_of(np.concatenate([head, tables])) != listed.checksum:
        raise InvalidInput(f"{path} is damaged: its header or tables do not have their checksum")
    site, run, branches, counts = _header(path, head.tobytes())
    if (site, run, *counts) != (
        *(listed.site, unit.run),
        *(listed.rows, listed.segments, listed.moments),
    ):
        raise InvalidInput(f"{path} and unit.json describe different rows, sites or runs")
    split = at.moments - at.segments
    return ShardFile(
        path,
        site,
        run,
        branches,
        counts[0],
        at,
        tables[:split].view("<i4").reshape(-1, len(SEGMENTS)),
        tables[split:].view("<f8").reshape(-1, len(MOMENTS)),
    )


def _header(
    path: Path, data: bytes
) -> tuple[SiteLayout, str, tuple[str, ...], tuple[int, int, int]]:
    """Site, run, branches, and the numbers of rows, segments and moments."""
    try:
        content = json.loads(data[8:])
        own = json.loads(content["__metadata__"]["dreamreader.shard"])
        found = own["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: its header is damaged: {error}") from error
    check_format(path, found)
    try:
        rows, segments, moments = (
            int(content[name]["shape"][0]) for name in ("values", "segments", "moments")
        )
        site, branches = site_from(own["site"]), tuple(own["branches"])
        return site, str(own["run"]), branches, (rows, segments, moments)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InvalidInput(f"{path}: its header is damaged: {error!r}") from error
