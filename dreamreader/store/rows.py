"""Rows of a store: where they are, and reading them a block at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader._progress import ProgressCallback, ProgressEvent
from dreamreader.store.layout import MOMENTS, SiteLayout
from dreamreader.store.shard import ShardFile, open_shard

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Segments:
    """Runs of rows of one site that lie side by side, in the order of the store.

    Attributes:
        site: whose rows. files: absolute paths of the shards. file_rows: rows of each.
        file: place in `files` of each run. first, rows: where it starts, and its length.
    """

    site: SiteLayout
    files: list[str]
    file_rows: Int[np.ndarray, " files"]
    file: Int[np.ndarray, " runs"]
    first: Int[np.ndarray, " runs"]
    rows: Int[np.ndarray, " runs"]

    @property
    def total(self) -> int:
        """Rows of all runs."""
        return int(self.rows.sum())


@dataclass(frozen=True)
class RowBlock:
    """Rows of one shard.

    Attributes:
        shard: they are in. unit: it belongs to. places: which rows, ascending.
    """

    shard: ShardFile
    unit: int
    places: Int[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.places)

    def head(self, rows: int) -> "RowBlock":
        """The first so many rows."""
        return replace(self, places=self.places[:rows])

    @cached_property
    def keys(self) -> Int[np.ndarray, "rows 4"]:
        """Columns KEYS. Whoever wants the values too asks for them first: that reads both."""
        return self._read()[1]

    @property
    def stored(self) -> Float[Tensor, "rows width"]:
        """The rows as they are on disk."""
        return torch.from_numpy(self._read()[0]).view(self.shard.site.stored)

    @property
    def values(self) -> Float[Tensor, "rows width"]:
        """The rows; float32 where they are stored with scales, which are multiplied in."""
        values, _, scales = self._read()
        stored = torch.from_numpy(values).view(self.shard.site.stored)
        return stored if scales is None else stored.float() * torch.from_numpy(scales)[:, None]

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Values as bytes, keys and scales, compared with the checksums of the rows.

        Raises:
            InvalidInput: the file is missing or has lost bytes, or a row is damaged.
        """
        shard, where = self.shard, self._where
        values, keys = shard.values[where], shard.keys[where]
        scales = None if shard.scales is None else shard.scales[where]
        shard.check_rows(self.places, values, keys, scales)
        self.__dict__["keys"] = keys
        return values, keys, scales

    def table(self, samples: "pa.Table") -> "pa.Table":
        """One line for each row: its sample, and when and where in it the row was taken.

        Args:
            samples: of its unit.
        """
        import pyarrow as pa

        sample = np.ascontiguousarray(self.keys[:, 0])
        columns = {"unit": pa.array(np.full(len(self), self.unit, np.int32))}
        columns["sample"] = pa.array(sample)
        for name in samples.column_names:
            columns[name] = _take(samples[name].combine_chunks(), columns["sample"])
        return pa.table(columns | self.times())

    def times(self) -> "dict[str, pa.Array]":
        """Of each row step, evaluation, timestep, sigma, fraction, branch and token."""
        import pyarrow as pa

        _, moment, branch, token = np.ascontiguousarray(self.keys.T)
        at = self.shard.moments[moment]
        columns = {name: pa.array(at[:, n].astype(np.int32)) for n, name in enumerate(MOMENTS[:2])}
        columns |= {name: pa.array(at[:, n + 2]) for n, name in enumerate(MOMENTS[2:5])}
        words = pa.array(self.shard.branches, pa.string())
        columns["branch"] = pa.DictionaryArray.from_arrays(pa.array(branch), words)
        return columns | {"token": pa.array(token)}

    @property
    def _where(self) -> "slice | Int[np.ndarray, ' rows']":
        places = self.places
        if len(places) and places[-1] - places[0] + 1 == len(places):
            return slice(int(places[0]), int(places[-1]) + 1)
        return places


def blocks_of(segments: Segments, rows: int | None = None) -> Iterator[RowBlock]:
    """The rows of segments, in their order, each block within one shard.

    Args:
        segments: from `Store.segments`. rows: of a block at most; 32 MB by default.
    """
    rows = rows or max(BLOCK_BYTES // segments.site.row_bytes, 1)
    bounds = np.searchsorted(segments.file, np.arange(len(segments.files) + 1))
    for number, name in enumerate(segments.files):
        path = Path(name)
        shard, unit = open_shard(path), int(path.parent.name)
        part = slice(*bounds[number : number + 2])
        places = _places(segments.first[part], segments.rows[part])
        for start in range(0, len(places), rows):
            yield RowBlock(shard, unit, places[start : start + rows])


def of_unit(segments: Segments, unit: int) -> Segments:
    """Those of one unit; none where it has no such rows."""
    numbers = [int(Path(name).parent.name) for name in segments.files]
    kept = [number for number, each in enumerate(numbers) if each == unit]
    own = np.isin(segments.file, kept)
    return replace(
        segments,
        files=[segments.files[number] for number in kept],
        file_rows=segments.file_rows[kept],
        file=segments.file[own] * 0,
        first=segments.first[own],
        rows=segments.rows[own],
    )


def report_rows(
    blocks: Iterable[RowBlock], total: int, report: ProgressCallback
) -> Iterator[RowBlock]:
    """The blocks, with a report of the rows behind each."""
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        report(ProgressEvent("rows", done, total))


def _places(first: Int[np.ndarray, " n"], rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " rows"]:
    """Every place of the runs, one after the other."""
    before = rows.cumsum() - rows
    return np.arange(rows.sum()) + np.repeat(first - before, rows)


def _take(column: "pa.Array", sample: "pa.Array") -> "pa.Array":
    """The column's value for each row; text once for each sample, as prompts can be long."""
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return pa.DictionaryArray.from_arrays(sample, column)
    return column.take(sample)
