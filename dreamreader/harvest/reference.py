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

from dreamreader._files import explained
from dreamreader.harvest.checksum import crc32c
from dreamreader.harvest.layout import Moment, SiteLayout, header_of, tensors_of
from dreamreader.harvest.unit import Shard, begin_unit, crc32c_of, seal_unit

if TYPE_CHECKING:
    import pyarrow as pa

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass
class _Rows:
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
        self._rows: dict[int, _Rows] = {}

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
        layout, held = self.sites[site], self._rows.setdefault(site, _Rows())
        rows, finite = _rows(x, places, minus, groups, layout.pool)
        values, scales = _stored(rows, layout.stored)
        if layout.stored.is_floating_point and not layout.scaled:
            finite &= values.isfinite().all(1)
        moment = int(keys[0, 1]) if len(keys) else 0
        held.not_finite[moment] = held.not_finite.get(moment, 0) + int((~finite).sum())
        held.values.append(values)
        held.keys.append(keys.clone())
        if scales is not None:
            held.scales.append(scales)
        return len(keys)

    def not_finite(self, site: int) -> dict[int, int]:
        """Rows so far, by moment, that have a value which is not finite."""
        return {k: n for k, n in self._rows.get(site, _Rows()).not_finite.items() if n}

    def seal(
        self, samples: "pa.Table", moments: Sequence[Moment], branches: Sequence[str]
    ) -> list[Shard]:
        """Ends the unit: from now on readers see it."""
        assert self._part is not None
        with explained(self.shards.parent):
            found = [
                self._write(site, held, moments, list(branches))
                for site, held in sorted(self._rows.items())
                if held.keys
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
        self, site: int, held: _Rows, moments: Sequence[Moment], branches: list[str]
    ) -> Shard:
        assert self._part is not None
        layout = self.sites[site]
        values = _bytes(torch.cat(held.values))
        keys = torch.cat(held.keys)
        parts = [values, _bytes(keys), *([_bytes(torch.cat(held.scales))] if held.scales else [])]
        segments = segments_of(keys.numpy())
        times = np.array(
            [
                [
                    m.step,
                    m.evaluation,
                    m.timestep,
                    m.sigma,
                    m.fraction,
                    0,
                    held.not_finite.get(n, 0),
                ]
                for n, m in enumerate(moments)
            ],
            dtype=np.float64,
        )
        header = header_of(layout, len(keys), len(segments), len(times), branches, self.run)
        at = tensors_of(layout, len(keys), len(segments), len(times))
        whole = np.zeros(at.bytes, dtype=np.uint8)
        starts = (at.values, at.keys, at.scales)
        for start, part in zip(starts, parts, strict=False):
            whole[start : start + part.size] = part.reshape(-1)
        whole[: at.values] = np.frombuffer(header, dtype=np.uint8)
        for start, part in (
            (at.checksums, crc32c(*parts)),
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


def _rows(
    x: Tensor, places: Tensor, minus: Tensor | None, groups: Tensor | None, pool: str
) -> tuple[Tensor, Tensor]:
    """The rows before they are converted, and which of them are finite."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    entry, token = places.long().unbind(1)
    rows = x[entry, token].to(wide)
    if minus is not None:
        rows = rows - minus[entry, token].to(wide)
    if pool != "none":
        assert groups is not None
        parts = rows.split(groups.diff().tolist())
        rows = torch.stack([each.mean(0) if pool == "mean" else each.amax(0) for each in parts])
    return rows, rows.isfinite().all(1)


def _stored(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if dtype not in _LARGEST:
        return rows.to(dtype), None
    largest = _LARGEST[dtype]
    scales = rows.where(rows.isfinite(), 0).abs().amax(1).float() / largest
    scales = scales.where(scales > 0, 1)
    q = (rows / scales[:, None].to(rows.dtype)).clamp(-largest, largest)
    return (q.nan_to_num(0).round() if dtype == torch.int8 else q).to(dtype), scales


def _bytes(tensor: Tensor) -> np.ndarray:
    """uint8 [rows, n]"""
    flat = tensor.cpu().contiguous()
    flat = flat[:, None] if flat.dim() == 1 else flat
    return flat.view(torch.uint8).numpy()
