"""The writer of a store: rows are packed into memory that threads write past the page cache."""

import operator
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader._files import explain_disk_errors
from dreamreader._register import chosen_backend, native
from dreamreader.errors import InvalidInput
from dreamreader.store.layout import (
    Moment,
    SiteLayout,
    header_of,
    moments_table,
    tensors_of,
)
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.unit import Shard, begin_unit, crc32c_of, seal_unit

if TYPE_CHECKING:
    import pyarrow as pa

Pressure = Literal["block", "sample"]
PRESSURES = ("block", "sample")
_STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
# Bytes: a slab is still in the caches of a CPU when it is written; a GPU wants long copies.
_SLABS = {"cpu": 1 << 20, "cuda": 4 << 20}
_POOLS = ("none", "mean", "max")
_MOST_BYTES, _MOST_THREADS = 1 << 46, 4096


def open_writer(
    store: Path | str,
    run: str,
    *,
    device: str | torch.device = "cpu",
    ring_bytes: int = 256 << 20,
    threads: int = 2,
    pressure: Pressure = "block",
) -> "NativeWriter | ReferenceWriter":
    """The writer of a store: the native one where it was built, else the reference.

    Args:
        store: its folder.
        run: digest of the fingerprint.
        device: of the model.
        ring_bytes: memory for rows on their way to the disk.
        threads: that write.
        pressure: what happens to rows while the disk is behind and the memory is full: `block`
            waits, `sample` leaves the rows of that call out and counts them. The reference never
            leaves rows out.

    Raises:
        InvalidInput: an unknown pressure, or a size that is not a positive whole number.
        MemoryError: the system does not have ring_bytes.
        OSError: it cannot start so many threads.
    """
    if pressure not in PRESSURES:
        raise InvalidInput(f"pressure={pressure!r}: use one of {', '.join(PRESSURES)}")
    try:
        ring_bytes, threads = operator.index(ring_bytes), operator.index(threads)
    except TypeError:
        what = f"ring_bytes={ring_bytes!r} and threads={threads!r}"
        raise InvalidInput(f"{what}: both must be whole numbers") from None
    if ring_bytes < 1 or threads < 1:
        raise InvalidInput(f"ring_bytes={ring_bytes} and threads={threads}: both must be positive")
    if ring_bytes > _MOST_BYTES or threads > _MOST_THREADS:
        most = f"at most {_MOST_BYTES:,} bytes and {_MOST_THREADS:,} threads are possible"
        raise InvalidInput(f"ring_bytes={ring_bytes:,} and threads={threads:,}: {most}")
    module = native()[0] if chosen_backend() in (None, "native") else None
    if module is None:
        return ReferenceWriter(Path(store), run)
    slab = _SLABS.get(torch.device(device).type, _SLABS["cpu"])
    pack_threads, leave_out = torch.get_num_threads(), pressure == "sample"
    try:
        core = module.ShardWriter(ring_bytes, slab, threads, pack_threads, leave_out)
    except MemoryError:
        raise MemoryError(f"ring_bytes={ring_bytes:,}: there is not as much memory") from None
    return NativeWriter(Path(store), run, core)


class NativeWriter:
    """Writes units of a store at the speed of the disk; the same bytes as `ReferenceWriter`.

    Rows are converted straight into slabs of memory that is allocated once. Full slabs go to
    threads that know nothing of Python: they compute the checksums and write with O_DIRECT. An
    error of the disk is raised by the next `put` or by `seal`; then the unit must be abandoned.

    Its threads do not survive a fork: in the child every call raises and `close` does nothing.

    Args:
        store: its folder.
        run: digest of the fingerprint.
        core: a `dreamreader._C.ShardWriter`; `open_writer` makes it.
    """

    def __init__(self, store: Path, run: str, core: Any):
        self.shards = store / "shards"
        self.run = run
        self.sites: list[SiteLayout] = []
        self._numbers: dict[SiteLayout, int] = {}
        self._core = core
        self._part: Path | None = None
        self._unit = -1
        self._process = os.getpid()
        self._reached: dict[torch.device, bool] = {}

    @property
    def info(self) -> dict[str, Any]:
        """Plain numbers on what happened so far.

        `ring_bytes`, `slab_bytes`; `written`: bytes of sealed shards; `waits`: of a `put` for the
        disk; `early`: slabs written before they were full, since every one was open; `grown`:
        allocations of memory that is kept; `direct`: False where the file system refused O_DIRECT
        and files went through the page cache.
        """
        return self._core.info()

    def site(self, layout: SiteLayout) -> int:
        """The number of a site; the same layout has the same number in every unit.

        Sites that are known when a unit begins share the memory evenly.
        """
        if layout not in self._numbers:
            stored, pool = _STORED.index(layout.stored), _POOLS.index(layout.pool)
            self._numbers[layout] = self._core.site(layout.file, layout.width, stored, pool)
            self.sites.append(layout)
        return self._numbers[layout]

    def begin(self, unit: int) -> None:
        """Starts a unit; one that was not sealed is dropped."""
        self.abandon()
        self._part, self._unit = begin_unit(self.shards, unit), unit
        self._core.begin(str(self._part))

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
        """Adds rows of a site, all of one moment; see `ops.pack` for places and groups.

        Args:
            site: from `site`.
            x: any strides; read before its stream goes on. Rows of a CUDA device are packed there;
                those of a device for which there is no code are copied to the CPU first.
            places, keys, groups: dense int32 on the CPU.
            minus: subtracted from x.

        Returns:
            How many rows were kept: all, or 0 where there was no room and the job leaves out.
        """
        assert self._part is not None
        x, minus = self._readable(x), None if minus is None else self._readable(minus)
        try:
            return self._core.put(site, x, places, keys, minus, groups)
        except OSError:
            with explain_disk_errors(self.shards.parent):
                raise

    def _readable(self, x: Tensor) -> Tensor:
        """x as C++ takes it: in memory that it reaches, with the signs that torch would add."""
        if x.is_neg():
            x = x.resolve_neg()
        if x.is_cpu:
            return x
        if x.device not in self._reached:
            self._reached[x.device] = self._reserve(x)
        return x if self._reached[x.device] else x.cpu()

    def _reserve(self, x: Tensor) -> bool:
        """Takes the memory for rows of a device; False where there is no code for it."""
        module: Any = native()[0]
        try:
            try:
                self._core.reserve(x)
            except MemoryError:  # torch holds what it freed
                torch.cuda.empty_cache()
                self._core.reserve(x)
        except module.NoCode:
            return False
        return True

    def not_finite(self, site: int) -> dict[int, int]:
        """Rows so far, by moment, that have a value which is not finite."""
        return {moment: n for moment, n in enumerate(self._core.not_finite(site)) if n}

    def left_out(self, site: int) -> dict[int, int]:
        """Rows so far, by moment, for which there was no room."""
        return {moment: n for moment, n in enumerate(self._core.left_out(site)) if n}

    def seal(
        self, samples: "pa.Table", moments: Sequence[Moment], branches: Sequence[str]
    ) -> list[Shard]:
        """Ends the unit: from now on readers see it."""
        assert self._part is not None
        with explain_disk_errors(self.shards.parent):
            self._core.flush()
            found = [self._finish(site, moments, list(branches)) for site in self._core.used()]
            self._core.wait()
        seal_unit(self._part, self._unit, self.run, found, samples)
        self._part = None
        return found

    def abandon(self) -> None:
        """Drops the unit that was begun."""
        if self._part is not None and os.getpid() == self._process:
            self._core.abandon()
            shutil.rmtree(self._part, ignore_errors=True)
            self._part = None

    def close(self) -> None:
        """Drops a unit that was begun, ends the threads and frees the memory."""
        self.abandon()
        self._core.close()

    def _finish(self, site: int, moments: Sequence[Moment], branches: list[str]) -> Shard:
        """Lets the file of a site be written to its end."""
        layout, rows = self.sites[site], self._core.rows(site)
        segments = self._core.segments(site)
        count = len(segments) // 16
        times = moments_table(moments, self.left_out(site), self.not_finite(site))
        at = tensors_of(layout, rows, count, len(times))
        header = header_of(layout, rows, count, len(times), branches, self.run)
        tail = (at.keys, at.scales, at.checksums, at.segments, at.moments, at.bytes)
        self._core.finish(site, header, times.tobytes(), tail)
        described = np.frombuffer(header + segments + times.tobytes(), dtype=np.uint8)
        return Shard(layout, rows, count, len(times), at.bytes, crc32c_of(described))
