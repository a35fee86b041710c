"""Running a harvest: one unit after the other, each sealed when it is whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dreamreader.errors import InvalidInput
from dreamreader.harvest.capture import Collector, Finder, NotFinite
from dreamreader.harvest.folder import HarvestFolder
from dreamreader.harvest.job import HarvestJob
from dreamreader.harvest.plan import MIB, HarvestPlan, make_plan
from dreamreader.jobs import fingerprint
from dreamreader.jobs.fingerprint import Fingerprint, portable
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.writer import NativeWriter, open_writer


def begin(job: HarvestJob, folder: HarvestFolder) -> HarvestPlan:
    """The plan of a store: that of the harvest that began there, or a new one.

    Raises:
        InvalidInput: the store is of another job, says how; or of several, or of a newer format.
    """
    before = folder.plan() or {}
    plan = make_plan(job, before.get("unit"), before.get("batch"), estimates=False)
    folder.begin(job.spec, fingerprint_of(job, plan), {"units": plan.units})
    if folder.job.units != (0, plan.units):
        raise InvalidInput(
            f"{folder.path} was merged from a part of this harvest, its units have other numbers; "
            "go on in the folder that it was merged from"
        )
    return plan


def harvest_unit(
    job: HarvestJob,
    plan: HarvestPlan,
    unit: int,
    writer: Any,
    room: int | None = None,
    report: Callable[[int, Collector], Any] | None = None,
) -> int | None:
    """Harvests one unit and seals it.

    Args:
        writer: see `open_writer`.
        room: bytes that it may have.
        report: called after every batch with the number of its samples.

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
            if report is not None:
                report(last - first, collector)
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


def writer_for(job: HarvestJob, folder: HarvestFolder) -> NativeWriter | ReferenceWriter:
    """A writer of the store, as the spec wants it."""
    options = job.spec.store
    ring = int(options.ring_mb * MIB)
    device = job.spec.subject.device
    return open_writer(
        folder.path, folder.run, device=device, ring_bytes=ring, pressure=options.pressure
    )


def _refuse(
    job: HarvestJob, plan: HarvestPlan, unit: int, writer: Any, collector: Collector
) -> None:
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


def _first_bad(job: HarvestJob, plan: HarvestPlan, unit: int, site: str) -> str:
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


def fingerprint_of(job: HarvestJob, plan: HarvestPlan) -> Fingerprint:
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
