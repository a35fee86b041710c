"""Harvests in Python: the same specs as objects."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamreader._progress import Progress, show_progress
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.harvest.capture import Collector
from dreamreader.harvest.folder import HarvestFolder
from dreamreader.harvest.job import HarvestJob
from dreamreader.harvest.page import write_report
from dreamreader.harvest.paired import open_pair
from dreamreader.harvest.plan import GB, HarvestPlan, make_plan
from dreamreader.harvest.run import begin, harvest_unit, writers_for
from dreamreader.harvest.spec import Spec
from dreamreader.jobs.job import Engine, JobVerdict, RunUnit, SpecJob, Work
from dreamreader.store.store import Store
from dreamreader.store.verify import verify

_REFRESHED = 60.0  # seconds between two writings of the index
_SHOWN = 20  # places of damage


class Harvest(SpecJob[Spec]):
    """Records chosen sites of a subject over many prompts to a store on disk.

    Args:
        spec: a `Spec`, or its content as a mapping; or give the fields by name.
        reader, target_reader: subjects of your own; the spec then only names them.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> harvest = Harvest(
        ...     name="attention", subject="shapes-unet", data={"scenes": {"count": 8}},
        ...     capture=[{"sites": "unet.mid_block", "tokens": {"random": 0.25}}],
        ... )
        >>> store = harvest.run("activations")
        >>> rows = store.read("unet.mid_block", steps=0)
    """

    kind, model, folder_type = "harvest", Spec, HarvestFolder
    counts, divides = "samples", True
    _began = _refreshed = 0.0

    def __init__(self, *args: Any, target_reader: Reader | None = None, **more: Any):
        super().__init__(*args, **more)
        self._target = target_reader

    @cached_property
    def job(self) -> HarvestJob:
        """The opened subjects and the prompts."""
        return open_pair(self.spec, self._reader, self._target)

    def plan(self) -> HarvestPlan:
        """Sites, rows, bytes, units and time; a few samples are run."""
        return make_plan(self.job)

    def run(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        limit_gb: float | None = None,
        progress: Progress = True,
        engine: Engine | None = None,
    ) -> Store:
        """Harvests what the store lacks.

        Args:
            out: the store, `runs/<name>` by default. A stopped harvest goes on there; a complete
                one is left as it is.
            limit_gb: most GB (10^9 bytes) of all shards. The job stops before the unit that would
                go beyond, and goes on there with a larger limit.
            progress: shown by default, or a function of a `ProgressEvent` (with `rows`, `bytes` of
                this run and `stored` of all), or False.
            engine: what harvests, such as a `RayEngine`; this process by default.

        Raises:
            InvalidInput: the store holds another harvest, is in use or cannot be written; or a row
                is not finite and `store.not_finite` is `refuse`.
        """
        limit = None if limit_gb is None else int(limit_gb * GB)
        return self._run(out, progress, engine, limit)

    def open(self) -> None:
        self.job  # noqa: B018

    def begin(self, folder: HarvestFolder) -> HarvestPlan:
        return begin(self.job, folder)

    def units(self, plan: HarvestPlan) -> int:
        return plan.units

    def size(self, plan: HarvestPlan, unit: int) -> int:
        start, stop = plan.range_of(unit)
        return stop - start

    def units_there(self, folder: HarvestFolder, plan: HarvestPlan) -> set[int]:
        return folder.sealed()

    def check_there(self, work: Work, there: set[int]) -> None:
        work.stored = sum(work.folder.size_of(unit, work.plan.units) for unit in there)
        self._began = self._refreshed = time.monotonic()  # opening the subject is no harvesting

    def expected_bytes(self, work: Work, unit: int) -> float:
        """Bytes of a unit by those that are there; an estimate, before there are any."""
        samples, plan = self.size(work.plan, unit), work.plan
        if work.done:
            return work.stored / work.done * samples * 0.9
        return 0.0 if plan.estimate is None else plan.estimate.bytes * samples * 0.9

    def opening(self, work: Work) -> str:
        there = f" ({work.done:,} are there)" if work.done else ""
        units = f"{work.plan.units:,} units of {work.plan.unit:,}"
        return f"{work.total:,} samples{there} in {units}"

    def note(self, work: Work) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rows, size = work.numbers["rows"], work.numbers["bytes"]
        return (
            f"{rows / seconds:,.0f} rows/s, {size / seconds / GB:.3f} GB/s, "
            f"{work.stored / GB:.2f} GB"
        )

    def check_divides(self) -> None:
        if self.spec.target is not None:
            raise InvalidInput(
                "Harvest: an engine is for one subject; leave target out, or run here"
            )
        super().check_divides()

    @contextmanager
    def open_runner(self, work: Work) -> Iterator[RunUnit]:
        job, writers = self.job, writers_for(self.job, work.folder)

        def run_unit(unit: int, room: int | None) -> int | None:
            rows = size = 0

            def count(samples: int, collectors: Sequence[Collector]) -> None:
                nonlocal rows, size
                now = [sum(getattr(c, name) for c in collectors) for name in ("rows", "nbytes")]
                more = {"rows": now[0] - rows, "bytes": now[1] - size}
                rows, size = now
                work.advance(samples, **more)

            found = harvest_unit(job, work.plan, unit, writers, room, count)
            if found is not None:
                work.numbers["bytes"] += found - size  # with keys and checksums
            return found

        try:
            yield run_unit
        finally:
            for writer in writers:
                writer.close()

    def after_unit(self, work: Work) -> None:
        if time.monotonic() - self._refreshed > _REFRESHED:
            work.folder.refresh()
            self._refreshed = time.monotonic()

    def after_interrupt(self, work: Work) -> None:
        try:
            work.folder.refresh()
        except InvalidInput:  # what stopped the job matters more
            pass

    def finish(self, work: Work) -> None:
        work.folder.refresh()
        if not work.stopped:
            work.folder.complete()

    def result(self, folder: HarvestFolder) -> Store:
        """The store."""
        return Store(folder.path)

    @classmethod
    def write_report(cls, folder: HarvestFolder) -> Path:
        return write_report(folder)

    @classmethod
    def results(cls, folder: HarvestFolder) -> Mapping[str, Any]:
        found = {}
        for number, each in enumerate(folder.stores):
            store, prefix = Store(each.path), "target " if number else ""
            found |= {prefix + site: {"rows": store.rows_of(site)} for site in store.sites}
        return found

    @classmethod
    def summary(cls, folder: HarvestFolder) -> list[str]:
        store = Store(folder.path)
        jobs, manifest = store.manifest.jobs, store.manifest
        names = ", ".join(str(job.spec.get("name", job.run[:12])) for job in jobs)
        units = sum(job.units[1] - job.units[0] for job in jobs)
        lines = [
            f"{names}: {store.rows:,} rows of {len(store.sites):,} sites, {store.nbytes / GB:.3f} "
            f"GB in {len(store.units):,} of {units:,} units"
        ]
        for what, counts in (
            ("left out, as the disk was too slow", manifest.left_out),
            ("not finite", manifest.not_finite),
        ):
            rows = sum(each.rows for each in counts)
            if rows:
                lines.append(f"{rows:,} rows {what}; manifest.json has them by site and step")
        if not manifest.complete:
            lines.append("not complete; the same command, with a larger limit if any, goes on")
        lines.append(f"store: {store.path.resolve()}")
        for each in folder.stores[1:]:
            own = Store(each.path)
            sites = f"{own.rows:,} rows of {len(own.sites):,} sites"
            lines.append(f"store of the target: {own.path.resolve()}, {sites}")
        return lines

    @classmethod
    def verify(
        cls, path: str | Path, rows: int = 8, seed: int = 0, progress: Progress = True
    ) -> JobVerdict:
        """Reads every byte of the stores and compares it with its checksum."""
        verdicts = [_verify_store(each.path, progress) for each in HarvestFolder(Path(path)).stores]
        lines = [line for each in verdicts for line in each.lines]
        return JobVerdict(all(each.holds for each in verdicts), lines)

    def __repr__(self) -> str:
        spec = self.spec
        to = f" and {spec.target.subject.model}" if spec.target is not None else ""
        return f"Harvest({spec.name!r}: {len(spec.capture)} captures of {spec.subject.model}{to})"


def _verify_store(path: Path, progress: Progress) -> JobVerdict:
    with show_progress(progress) as report:
        found = verify(path, report)
    read = f"{found.units:,} units, {found.rows:,} rows, {found.bytes / GB:,.3f} GB read"
    if found.holds:
        return JobVerdict(True, [f"{read}: all as it was written"])
    lines = [str(damage) for damage in found.damage[:_SHOWN]]
    if len(found.damage) > _SHOWN:
        lines.append(f"... and {len(found.damage) - _SHOWN:,} more")
    lines.append(f"{read}: {len(found.damage):,} things are wrong")
    units = sorted({each.file.split("/")[1] for each in found.damage if "/" in each.file})
    if units:
        listed = ", ".join(f"shards/{unit}" for unit in units[:_SHOWN])
        lines.append(
            "a unit that is damaged can be deleted, and the harvest run again to make it "
            f"anew: {listed}"
        )
    return JobVerdict(False, lines)
