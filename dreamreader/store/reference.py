"""The reference of the writer of a store, in plain torch: right, simple, and slow."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader._files import explain_disk_errors
from dreamreader.ops.pack import POOLS, pack_reference
from dreamreader.store.checksum import crc32c_reference
from dreamreader.store.layout import Moment, SiteLayout, header_of, moments_table, tensors_of
from dreamreader.store.unit import Shard, begin_unit, crc32c_of, seal_unit

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class _ReferenceRows:
    """The rows of one site in one unit."""

    values: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    not_finite: dict[int, int] = field(default_factory=dict)


class ReferenceWriter:
    """Writes units of a store; see `NativeWriter`, which gives the same files.

    Args:
        store: its folder.
        run: digest of the fingerprint.
    """

    def __init__(self, store: Path, run: str):
        self.shards = Path(store) / "shards"
        self.run = run
        self.sites: list[SiteLayout] = []
        self._part: Path | None = None
        self._unit = -1
        self._rows: dict[int, _ReferenceRows] = {}

    def site(self, layout: SiteLayout) -> int:
        """The number of a site; the same layout has the same number in every unit."""
        if layout not in self.sites:
            self.sites.append(layout)
        return self.sites.index(layout)

    def begin(self, unit: int) -> None:
        """Starts a unit."""
        self._part, self._unit, self._rows = begin_unit(self.shards, unit), unit, {}

    def put(
        self,
        site: int,
        x: Float[Tensor, "entries tokens features"],
        places: Int[Tensor, "places 2"],
        keys: Int[Tensor, "rows 4"],
        *,
        minus: Float[Tensor, "entries tokens features"] | None = None,
        groups: Int[Tensor, " rows_1"] | None = None,
    ) -> int:
        """Adds rows of a site; see `ops.pack` for places and groups, KEYS for the keys.

        Returns:
            How many rows were kept: all, or 0 where there was no room and the job leaves out.
        """
        if not len(keys):
            return 0
        layout, held = self.sites[site], self._rows.setdefault(site, _ReferenceRows())
        values = torch.empty(len(keys), layout.width, dtype=layout.stored)
        scales = torch.empty(len(keys)) if layout.scaled else None
        odd = torch.zeros(1, dtype=torch.int64)
        less = None if minus is None else minus.detach()
        pool = POOLS.index(layout.pool)
        pack_reference(values, scales, odd, x.detach(), places, less, groups, pool)
        moment = int(keys[0, 1])
        held.not_finite[moment] = held.not_finite.get(moment, 0) + int(odd)
        held.values.append(values)
        held.keys.append(keys.clone())
        if scales is not None:
            held.scales.append(scales)
        return len(keys)

    def not_finite(self, site: int) -> dict[int, int]:
        """Rows so far, by moment, that have a value which is not finite."""
        return {k: n for k, n in self._rows.get(site, _ReferenceRows()).not_finite.items() if n}

    def seal(
        self, samples: "pa.Table", moments: Sequence[Moment], branches: Sequence[str]
    ) -> list[Shard]:
        """Ends the unit: from now on readers see it."""
        assert self._part is not None
        with explain_disk_errors(self.shards.parent):
            found = [
                self._write(site, held, moments, list(branches))
                for site, held in sorted(self._rows.items())
            ]
        seal_unit(self._part, self._unit, self.run, found, samples)
        self._part = None
        return found

    def abandon(self) -> None:
        """Drops the unit that was begun."""
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part = None

    def close(self) -> None:
        self.abandon()

    def _write(
        self, site: int, held: _ReferenceRows, moments: Sequence[Moment], branches: list[str]
    ) -> Shard:
        assert self._part is not None
        layout = self.sites[site]
        values = _bytes(torch.cat(held.values))
        keys = torch.cat(held.keys)
        parts = [values, _bytes(keys), *([_bytes(torch.cat(held.scales))] if held.scales else [])]
        segments = segments_of(keys.numpy())
        times = moments_table(moments, {}, held.not_finite)
        header = header_of(layout, len(keys), len(segments), len(times), branches, self.run)
        at = tensors_of(layout, len(keys), len(segments), len(times))
        whole = np.zeros(at.bytes, dtype=np.uint8)
        starts = (at.values, at.keys, at.scales)
        for start, part in zip(starts, parts, strict=False):
            whole[start : start + part.size] = part.reshape(-1)
        whole[: at.values] = np.frombuffer(header, dtype=np.uint8)
        for start, part in (
            (at.checksums, crc32c_reference(*parts)),
            (at.segments, segments),
            (at.moments, times),
        ):
            whole[start : start + part.nbytes] = part.reshape(-1).view(np.uint8)
        whole.tofile(self._part / layout.file)
        described = np.concatenate([whole[: at.values], whole[at.segments :]])
        return Shard(layout, len(keys), len(segments), len(times), at.bytes, crc32c_of(described))


def segments_of(keys: Int[np.ndarray, "rows 4"]) -> Int[np.ndarray, "segments 4"]:
    """The runs of rows that have one moment and branch: moment, branch, first, rows; int32."""
    pair = keys[:, 1:3]
    starts = np.flatnonzero(np.any(pair[1:] != pair[:-1], axis=1)) + 1
    first = np.concatenate([[0], starts]).astype(np.int32)
    rows = np.diff(np.append(first, len(keys))).astype(np.int32)
    return np.column_stack([pair[first], first, rows]).astype(np.int32)


def _bytes(tensor: Tensor) -> np.ndarray:
    """uint8 [rows, n]"""
    flat = tensor.cpu().contiguous()
    flat = flat[:, None] if flat.dim() == 1 else flat
    return flat.view(torch.uint8).numpy()
