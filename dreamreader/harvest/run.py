"""Running a harvest: unit after unit, to a store that a stopped job goes on with."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreamreader._files import locked
from dreamreader.errors import InvalidInput
from dreamreader.harvest.capture import Collector, Finder, NotFinite
from dreamreader.harvest.job import HarvestJob
from dreamreader.harvest.plan import MIB, Plan, make_plan
from dreamreader.jobs import fingerprint
from dreamreader.jobs.differences import first_difference
from dreamreader.jobs.fingerprint import Fingerprint, portable
from dreamreader.store.index import sealed_units, write_index
from dreamreader.store.layout import unit_folder
from dreamreader.store.manifest import Job, Manifest
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.unit import Unit, read_unit
from dreamreader.store.writer import NativeWriter, open_writer

_REFRESHED = 60.0  # seconds between two writings of the index


@dataclass
class Progress:
    """How far a harvest is.

    Attributes:
        samples: finished ones, of `total`. there: those of them that an earlier run finished.
        rows, bytes: written by this run. stored: bytes of all shards.
        units: sealed ones. stopped: whether the limit of bytes ended the run.
        lost: workers that ended before their work did, of an engine that has some.
    """

    total: int
    there: int = 0
    samples: int = 0
    rows: int = 0
    bytes: int = 0
    stored: int = 0
    units: int = 0
    stopped: bool = False
    lost: int = 0


@dataclass(eq=False)
class Work:
    """The units that a store lacks, for an engine to harvest.

    Attributes:
        run: digest of the fingerprint. missing: units. limit: bytes of all shards.
        progress: the engine keeps it up to date. advance: to be called whenever it did.
    """

    job: HarvestJob
    store: Path
    plan: Plan
    run: str
    missing: list[int]
    limit: int | None
    progress: Progress
    advance: Callable[[Progress], Any]
    _refreshed: float = field(default_factory=time.monotonic)

    def refresh(self) -> None:
        """Brings the index up to date, where that was long ago."""
        if time.monotonic() - self._refreshed > _REFRESHED:
            write_index(self.store)
            self._refreshed = time.monotonic()


Engine = Callable[[Work], None]  # harvests units until all are sealed or the limit is reached


def run_job(
    job: HarvestJob,
    store: Path,
    limit: int | None = None,
    started: Callable[[Plan, Progress], Any] | None = None,
    advance: Callable[[Progress], Any] | None = None,
    engine: Engine | None = None,
) -> Progress:
    """Harvests the units that a store lacks.

    Args:
        job: opened. store: its folder, new or of the same job.
        limit: bytes of all shards; the job stops before the unit that would go beyond.
        started: called with the plan and what is there already.
        advance: called after every batch.
        engine: what harvests the units; this process, one after the other, by default.

    Raises:
        InvalidInput: the store is of another job or a newer format, in use, or cannot be written;
            or rows are not finite and the spec refuses them.
    """
    with locked(store):
        plan, manifest = begun(job, store)
        tidy(store)
        sealed = sealed_units(store)
        progress = Progress(job.samples, units=len(sealed))
        for unit in sealed:
            progress.stored += _own(store, unit, plan, manifest.jobs[0].run).bytes
            progress.there += plan.range_of(unit)[1] - plan.range_of(unit)[0]
        progress.samples = progress.there
        if started is not None:
            started(plan, progress)
        missing = sorted(set(range(plan.units)).difference(sealed))
        if missing or not manifest.complete:
            run, said = manifest.jobs[0].run, advance or _silent
            try:
                (engine or _harvest)(Work(job, store, plan, run, missing, limit, progress, said))
            except BaseException:
                _refreshed(store)
                raise
            write_index(store)
            if not progress.stopped:
                replace(Manifest.read(store), complete=True).write(store)
    return progress


def begun(job: HarvestJob, store: Path) -> tuple[Plan, Manifest]:
    """The plan and the manifest of a store: those that are there, or new ones.

    Raises:
        InvalidInput: the store is of another job, says how; or of several, or of a newer format.
    """
    if not Manifest.there(store):
        if sealed_units(store):
            raise InvalidInput(f"{store} has units, but no manifest.json; give another folder")
        plan = make_plan(job, estimates=False)
        taken = fingerprint_of(job, plan)
        spec = job.spec.model_dump(mode="json")
        manifest = Manifest((Job(taken.digest, (0, plan.units), spec, taken.as_dict()),))
        manifest.write(store)
        return plan, manifest
    manifest = Manifest.read(store)
    if len(manifest.jobs) != 1:
        raise InvalidInput(
            f"{store} holds {len(manifest.jobs)} harvests, so none of them goes on there; give "
            "another folder"
        )
    earlier = manifest.jobs[0].fingerprint
    settings = earlier.get("settings", {})
    plan = make_plan(job, settings.get("unit"), settings.get("batch"), estimates=False)
    taken = fingerprint_of(job, plan)
    if earlier.get("digest") != taken.digest:
        raise InvalidInput(
            f"{store} holds another harvest: {first_difference(earlier, taken.as_dict())}. Give "
            "another folder, or delete this one"
        )
    if manifest.jobs[0].units != (0, plan.units):
        raise InvalidInput(
            f"{store} was merged from a part of this harvest, its units have other numbers; go on "
            "in the folder that it was merged from"
        )
    return plan, manifest


def harvest_unit(
    job: HarvestJob,
    plan: Plan,
    unit: int,
    writer: Any,
    room: int | None = None,
    ran: Callable[[int, Collector], Any] | None = None,
) -> int | None:
    """Harvests one unit and seals it.

    Args:
        writer: see `open_writer`.
        room: bytes that it may have. ran: called after every batch with the number of its samples.

    Returns:
        Bytes of its shards; None where it would have had more than `room`, and was dropped.

    Raises:
        InvalidInput: a row is not finite and the spec refuses it, or the store cannot be written.
    """
    start, stop = plan.range_of(unit)
    items, seeds = job.read(start, stop)
    collector = job.collector(writer)
    collector.begin(start)
    writer.begin(unit)
    try:
        for first in range(0, len(items), plan.batch):
            last = min(first + plan.batch, len(items))
            collector.batch(first)
            job.run(items[first:last], seeds[first:last], collector.streams)
            if ran is not None:
                ran(last - first, collector)
        if job.spec.store.not_finite == "refuse":
            _refuse(job, plan, unit, writer, collector)
        if room is not None and collector.nbytes > room:
            writer.abandon()
            return None
        table = job.prompts.table(items, seeds)
        shards = writer.seal(table, collector.moments, collector.branches)
    except BaseException:
        writer.abandon()
        raise
    return sum(shard.bytes for shard in shards)


def _own(store: Path, number: int, plan: Plan, run: str) -> Unit:
    """A sealed unit of this job, under its own number.

    Raises:
        InvalidInput: it is damaged, or was copied here from another place.
    """
    folder = store / "shards" / unit_folder(number)
    unit = read_unit(folder)
    if (unit.run, unit.number) != (run, number) or number >= plan.units:
        whose = "this harvest" if unit.run == run else f"another harvest, {unit.run[:16]}"
        raise InvalidInput(
            f"{folder} is unit {unit.number} of {whose}; take it away, and run the same command "
            "again to go on"
        )
    return unit


def writer_for(job: HarvestJob, store: Path, run: str) -> NativeWriter | ReferenceWriter:
    """A writer of the store, as the spec wants it."""
    options = job.spec.store
    ring = int(options.ring_mb * MIB)
    device = job.spec.subject.device
    return open_writer(store, run, device=device, ring_bytes=ring, pressure=options.pressure)


def _harvest(work: Work) -> None:
    """Harvests unit after unit, in this process."""
    progress = work.progress
    done = progress.samples, 0, 0  # samples, rows and bytes of the units that are sealed

    def ran(samples: int, collector: Collector) -> None:
        progress.samples += samples
        progress.rows, progress.bytes = done[1] + collector.rows, done[2] + collector.nbytes
        work.advance(progress)

    writer = writer_for(work.job, work.store, work.run)
    try:
        for unit in work.missing:
            room = None if work.limit is None else work.limit - progress.stored
            found = None
            if room is None or expected(work.plan, unit, progress) <= room:
                found = harvest_unit(work.job, work.plan, unit, writer, room, ran)
            if found is None:
                progress.samples, progress.rows, progress.bytes = done
                progress.stopped = True
                return
            progress.stored += found
            progress.units += 1
            progress.bytes = done[2] + found
            done = progress.samples, progress.rows, progress.bytes
            work.refresh()
    finally:
        writer.close()


def _silent(progress: Progress) -> None:
    """For who does not want to know."""


def expected(plan: Plan, unit: int, progress: Progress) -> float:
    """Bytes that a unit will have, by those that are there; an estimate, before it is run."""
    start, stop = plan.range_of(unit)
    if progress.samples:
        return progress.stored / progress.samples * (stop - start) * 0.9
    return 0.0 if plan.estimate is None else plan.estimate.bytes * (stop - start) * 0.9


def _refuse(job: HarvestJob, plan: Plan, unit: int, writer: Any, collector: Collector) -> None:
    """Raises where a row of the unit is not finite, and says which."""
    bad = {
        name: found
        for name, each in collector.taken.items()
        if (found := writer.not_finite(each.number))
    }
    if not bad:
        return
    site, counts = next(iter(bad.items()))
    step = collector.moments[min(counts)].step
    whose = _first_bad(job, plan, unit, site)
    when = "" if step < 0 else f" at step {step}"
    rows = sum(sum(found.values()) for found in bad.values())
    raise InvalidInput(
        f"{site}: a row is not finite{when}{whose}; {rows:,} rows of unit {unit} are not. "
        "store.not_finite=keep stores and counts them"
    )


def _first_bad(job: HarvestJob, plan: Plan, unit: int, site: str) -> str:
    """In words, the sample whose row at a site is not finite, found by running the unit again."""
    start, stop = plan.range_of(unit)
    items, seeds = job.read(start, stop)
    captures = [(each, [site]) for each, names in job.captures if site in names]
    collector = replace(job, captures=captures).collector(Finder())
    collector.begin(start)
    for first in range(0, len(items), plan.batch):
        collector.batch(first)
        batch = slice(first, first + plan.batch)
        try:
            job.run(items[batch], seeds[batch], collector.streams)
        except NotFinite as found:
            sample = found.key[0]
            return f", prompt {items[sample].id!r}, seed {seeds[sample]}"
    return ""


def fingerprint_of(job: HarvestJob, plan: Plan) -> Fingerprint:
    """All that the rows depend on: the spec with its defaults, the prompts, units and batches."""
    left_out = {"name", "data", "store", "batch"}  # prompts, unit and batch say it
    settings = {
        "spec": portable(job.spec.model_dump(mode="json", exclude=left_out)),
        "prompts": job.prompts.digest,
        "sites": job.sites,
        "unit": plan.unit,
        "batch": plan.batch,
    }
    reader = job.reader
    return fingerprint(reader.subject, settings, job.spec.seed_list, reader.tokenizer)


def tidy(store: Path) -> None:
    """Takes away what was not finished when an earlier run was killed."""
    for part in (store / "shards").glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)  # a lost worker may still write there, unseen
    for part in store.glob(".*.part"):
        part.unlink()


def _refreshed(store: Path) -> None:
    """Brings the index up to date, where the disk lets us: what stopped the job matters more."""
    try:
        write_index(store)
    except InvalidInput:
        pass
