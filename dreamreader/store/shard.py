"""Reading one shard: its header and tables at once, its rows as they are asked for."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32

from dreamreader.errors import InvalidInput
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
    def values(self) -> UInt8[np.ndarray, "rows bytes"]:
        """The rows as bytes, mapped."""
        return self._map(self.at.values, np.dtype(np.uint8), (self.rows, self.site.row_bytes))

    @cached_property
    def keys(self) -> Int[np.ndarray, "rows 4"]:
        """Columns KEYS, mapped."""
        return self._map(self.at.keys, np.dtype("<i4"), (self.rows, len(KEYS)))

    @cached_property
    def scales(self) -> Float[np.ndarray, " rows"] | None:
        """What stored values are multiplied with, mapped; None where they are as they were."""
        if not self.site.scaled:
            return None
        return self._map(self.at.scales, np.dtype("<f4"), (self.rows,))

    @cached_property
    def checksums(self) -> UInt32[np.ndarray, " rows"]:
        """CRC-32C of each row, mapped."""
        return self._map(self.at.checksums, np.dtype("<u4"), (self.rows,))

    def _map(self, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
        if not self.rows:
            return np.zeros(shape, dtype)
        # Copy on write, because torch warns of memory that cannot be written.
        return np.memmap(self.path, dtype=dtype, mode="c", offset=start, shape=shape)


def open_shard(path: Path) -> ShardFile:
    """Reads the header and the tables of a shard, none of its rows.

    Raises:
        InvalidInput: it is missing, truncated or damaged, or of a newer format.
    """
    try:
        with open(path, "rb") as file:
            site, run, branches, counts = _header(path, file.read(HEADER))
            at = tensors_of(site, *counts)
            size = file.seek(0, 2)
            if size != at.bytes:
                raise InvalidInput(f"{path} has {size:,} bytes, its header says {at.bytes:,}")
            file.seek(at.segments)
            tables = file.read(at.bytes - at.segments)
    except FileNotFoundError:
        raise InvalidInput(f"{path} is missing") from None
    split = at.moments - at.segments
    return ShardFile(
        path,
        site,
        run,
        branches,
        counts[0],
        at,
        np.frombuffer(tables[:split], "<i4").reshape(-1, len(SEGMENTS)),
        np.frombuffer(tables[split:], "<f8").reshape(-1, len(MOMENTS)),
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
