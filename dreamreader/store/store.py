"""A store of activations, as readers see it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._checked import read_table
from dreamreader.engine import in_steps, normalized_steps
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.store.index import Index, current, read_index, sealed_units
from dreamreader.store.layout import SiteLayout, unit_folder
from dreamreader.store.manifest import Manifest
from dreamreader.store.rows import Block, Segments, blocks_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Rows:
    """Rows of one site in memory.

    Attributes:
        values: as stored, or float32 where they were stored with scales.
        keys: one line for each row: unit, sample, the sample's own columns (id, seed, ...), step,
            evaluation, timestep, sigma, fraction, branch, token.
    """

    values: Float[Tensor, "rows width"]
    keys: "pa.Table"


class Store:
    """Opens a store: the units that are sealed now, of a harvest that is complete or goes on.

    Args:
        path: its folder. Units that its index does not have yet are read from their shards.

    Raises:
        InvalidInput: it is no store, a file of it is damaged, or of a newer format.

    Example:
        >>> store = Store("activations")
        >>> rows = store.read("unet.mid_block", steps=slice(0, 5), branch="cond", limit=1000)
        >>> rows.values.shape, rows.keys.column_names
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if Manifest.there(self.path) or not sealed_units(self.path):
            self.manifest = Manifest.read(self.path)
        else:
            self.manifest = Manifest()  # of units alone, written without a job
        self._index: Index = current(self.path, read_index(self.path))
        self._samples: tuple[int, pa.Table] | None = None

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.rows:,} rows of {len(self.sites)} sites)"

    @property
    def index(self) -> "pa.Table":
        """One line for each run of rows of one site, step, evaluation and branch."""
        return self._index.table

    @property
    def sites(self) -> dict[str, SiteLayout]:
        """What the rows of each site are, by name."""
        return dict(self._index.sites)

    @property
    def units(self) -> list[int]:
        """Numbers of the sealed units."""
        return list(self._index.units)

    @property
    def rows(self) -> int:
        """Rows of all sites."""
        return int(self._column("rows").sum())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return int(self._column("bytes")[_starts(self._column("shard"))].sum())

    @property
    def steps(self) -> list[int]:
        """Steps that have rows, ascending."""
        return np.unique(self._column("step")).tolist()

    @property
    def branches(self) -> list[str]:
        """Branches that have rows."""
        codes = np.unique(self._column("branch"))
        return [self._words("branch")[code] for code in codes]

    def rows_of(self, site: str) -> int:
        """Rows of one site."""
        return int(self._column("rows")[self._lines(site, None, None)].sum())

    def samples(self, unit: int) -> "pa.Table":
        """The samples of a unit: prompt id, prompt, seed and further columns of each.

        Raises:
            InvalidInput: the unit is not there, or its file is damaged.
        """
        if unit not in self._index.units:
            raise InvalidInput(f"{self.path}: no unit {unit} among its {len(self.units):,}")
        if self._samples is None or self._samples[0] != unit:
            self._samples = (unit, read_samples(self.path, unit))
        return self._samples[1]

    def segments(
        self, site: str, steps: Any = None, branch: str | Sequence[str] | None = None
    ) -> Segments:
        """Where rows of a site are.

        Args:
            site: its name. branch: one or several; all by default.
            steps: as `Record` takes them; negative numbers count from the last step stored.

        Raises:
            UnknownName: the store has no such site or branch.
        """
        lines = self._lines(site, steps, branch)
        shard, first, rows = (self._column(name)[lines] for name in ("shard", "first", "rows"))
        starts = _starts(shard)
        files = self._words("shard")
        new = np.ones(len(lines), bool)  # runs that do not go on from the line before
        new[1:] = (shard[1:] != shard[:-1]) | (first[:-1] + rows[:-1] != first[1:])
        file = np.zeros(len(lines), np.int32)
        file[starts] = 1
        return Segments(
            self.sites[site],
            [str(self.path.absolute() / files[code]) for code in shard[starts]],
            self._column("shard_rows")[lines[starts]],
            (file.cumsum(dtype=np.int32) - 1)[new],
            first[new],
            np.add.reduceat(rows, np.flatnonzero(new)) if len(lines) else rows,
        )

    def blocks(
        self,
        site: str,
        steps: Any = None,
        branch: str | Sequence[str] | None = None,
        rows: int | None = None,
    ) -> Iterator[Block]:
        """Rows of a site in the order of the store, a block at a time; memory does not grow.

        Args:
            site, steps, branch: see `segments`.
            rows: of a block at most; about 32 MB by default.
        """
        return blocks_of(self.segments(site, steps, branch), rows)

    def read(
        self,
        site: str,
        steps: Any = None,
        branch: str | Sequence[str] | None = None,
        limit: int | None = None,
    ) -> Rows:
        """Reads rows of a site into memory.

        Args:
            site, steps, branch: see `segments`. limit: the first so many rows only.

        Raises:
            UnknownName: the store has no such site or branch.
        """
        import pyarrow as pa

        segments = self.segments(site, steps, branch)
        total = segments.total if limit is None else min(limit, segments.total)
        kind = torch.float32 if segments.site.scaled else segments.site.stored
        values = torch.empty(total, segments.site.width, dtype=kind)
        tables, done = [], 0
        for block in blocks_of(segments):
            if done == total:
                break
            block = block.head(total - done)
            values[done : done + len(block)] = block.values
            tables.append(self.keys(block))
            done += len(block)
        return Rows(values, pa.concat_tables(tables) if tables else pa.table({}))

    def keys(self, block: Block) -> "pa.Table":
        """What is known of each row of a block; see `Rows.keys`."""
        return block.table(self.samples(block.unit))

    def _lines(self, site: str, steps: Any, branch: str | Sequence[str] | None) -> np.ndarray:
        """Numbers of the lines of the index that are chosen."""
        if site not in self._index.sites:
            raise UnknownName("site", site, self._index.sites, f"{self.path} has no other")
        chosen = self._is("site", [site])
        if branch is not None:
            wanted = [branch] if isinstance(branch, str) else list(branch)
            for each in wanted:
                if each not in self.branches:
                    raise UnknownName("branch", each, self.branches)
            chosen = chosen & self._is("branch", wanted)
        if steps is not None:
            known, place = np.unique(self._column("step"), return_inverse=True)
            total = int(known[-1]) + 1 if len(known) else 0
            selected = normalized_steps(steps, f"{self.path}: steps")
            hit = np.array([in_steps(selected, int(step), total) for step in known], bool)
            chosen = chosen & hit[place]
        return np.flatnonzero(chosen)

    def _is(self, column: str, words: Sequence[str]) -> np.ndarray:
        """Which lines have one of the words."""
        return np.array([each in words for each in self._words(column)], bool)[self._column(column)]

    def _column(self, name: str) -> np.ndarray:
        """A column of the index; of words their places in `_words`."""
        column = self._whole(name)
        return (column.indices if hasattr(column, "indices") else column).to_numpy()

    def _words(self, name: str) -> list[str]:
        return self._whole(name).dictionary.to_pylist()

    def _whole(self, name: str) -> Any:
        column = self.index[name]
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def read_samples(folder: Path, unit: int) -> "pa.Table":
    """The samples of a sealed unit.

    Raises:
        InvalidInput: the file is missing or damaged.
    """
    file = Path(folder) / "shards" / unit_folder(unit) / "samples.parquet"
    try:
        return read_table(file)
    except FileNotFoundError:
        raise InvalidInput(f"{file} is missing") from None


def _starts(shard: np.ndarray) -> np.ndarray:
    """Where a new shard begins among lines."""
    return np.flatnonzero(np.diff(shard, prepend=-1))
