"""Running a harvest: one unit after the other, each sealed when it is whole."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dreamreader.errors import InvalidInput
from dreamreader.harvest.capture import Collector, Counter, Finder, NotFinite
from dreamreader.harvest.folder import HarvestFolder
from dreamreader.harvest.job import HarvestJob
from dreamreader.harvest.paired import run_batch
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
    units = {"units": plan.units}
    taken = fingerprints_of(job, plan)
    folder.begin(job.spec, taken[0], units)
    if job.target is not None:
        folder.target.begin(job.target.spec, taken[1], units)
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
    writers: Sequence[Any],
    room: int | None = None,
    report: Callable[[int, Sequence[Collector]], Any] | None = None,
) -> int | None:
    """Harvests one unit and seals it, in the store of each subject.

    Args:
        writers: of each subject, see `open_writer`.
        room: bytes that it may have.
        report: called after every batch with the number of its samples.

    Returns:
        Bytes of its shards; None where it would have had more than `room`, and was dropped.

    Raises:
        InvalidInput: a row is not finite and the spec refuses it, or the store cannot be written.
    """
    start, stop = plan.range_of(unit)
    items, seeds = job.read(start, stop)
    collectors = [side.collector(writer) for side, writer in zip(job.sides, writers, strict=True)]
    for collector, writer in zip(collectors, writers, strict=True):
        collector.begin(start)
        writer.begin(unit)
    try:
        for first in range(0, len(items), plan.batch):
            last = min(first + plan.batch, len(items))
            for collector in collectors:
                collector.batch(first)
            run_batch(job, items[first:last], seeds[first:last], collectors)
            if report is not None:
                report(last - first, collectors)
        if job.spec.store.not_finite == "refuse":
            for side, (writer, collector) in enumerate(zip(writers, collectors, strict=True)):
                _refuse(job, plan, unit, side, writer, collector)
        if room is not None and sum(each.nbytes for each in collectors) > room:
            for writer in writers:
                writer.abandon()
            return None
        table = job.prompts.table(items, seeds)
        shards = [  # one that a stopped job has sealed is left as it is
            shard
            for writer, collector in zip(writers, collectors, strict=True)
            for shard in writer.seal(table, collector.moments, collector.branches)
        ]
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise
    return sum(shard.bytes for shard in shards)


def writers_for(job: HarvestJob, folder: HarvestFolder) -> list[NativeWriter | ReferenceWriter]:
    """Writers of the stores of the subjects, as the spec wants them."""
    folders = (folder, folder.target)
    return [writer_for(*each) for each in zip(job.sides, folders, strict=False)]


def writer_for(job: HarvestJob, folder: HarvestFolder) -> NativeWriter | ReferenceWriter:
    """A writer of the store, as the spec wants it."""
    options = job.spec.store
    ring = int(options.ring_mb * MIB)
    device = job.spec.subject.device
    return open_writer(
        folder.path, folder.run, device=device, ring_bytes=ring, pressure=options.pressure
    )


def _refuse(
    job: HarvestJob, plan: HarvestPlan, unit: int, side: int, writer: Any, collector: Collector
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
    whose = _first_bad(job, plan, unit, side, site)
    when = "" if step < 0 else f" at step {step}"
    rows = sum(sum(found.values()) for found in bad.values())
    raise InvalidInput(
        f"{site}: a row is not finite{when}{whose}; {rows:,} rows of unit {unit} are not. "
        "store.not_finite=keep stores and counts them"
    )


def _first_bad(job: HarvestJob, plan: HarvestPlan, unit: int, side: int, site: str) -> str:
    """In words, the sample whose row at a site is not finite, found by running the unit again."""
    start, stop = plan.range_of(unit)
    items, seeds = job.read(start, stop)
    own = job.sides[side]
    captures = [(each, [site]) for each, names in own.captures if site in names]
    finder = replace(own, captures=captures).collector(Finder())
    collectors = [finder if each is own else each.collector(Counter()) for each in job.sides]
    for each in collectors:
        each.begin(start)
    for first in range(0, len(items), plan.batch):
        for each in collectors:
            each.batch(first)
        batch = slice(first, first + plan.batch)
        try:
            run_batch(job, items[batch], seeds[batch], collectors)
        except NotFinite as found:
            sample = found.key[0]
            return f", prompt {items[sample].id!r}, seed {seeds[sample]}"
    return ""


def fingerprints_of(job: HarvestJob, plan: HarvestPlan) -> list[Fingerprint]:
    """All that the rows of each subject depend on; those of two say that they belong together."""
    taken = [_fingerprint(side, plan) for side in job.sides]
    pair = job.spec.target
    if pair is None:
        return taken
    own = pair.model_dump(mode="json", include={"schedule", "trajectory", "branch"})
    digest = hashlib.sha256("".join([each.digest for each in taken]).encode()).hexdigest()
    found = []
    for name, each in zip(("source", "target"), taken, strict=True):
        said = {"side": name, "both": digest, **own}
        found.append(replace(each, settings={**each.settings, "pair": said}))
    return found


def _fingerprint(job: HarvestJob, plan: HarvestPlan) -> Fingerprint:
    """Of one subject: the spec with its defaults, the prompts, units and batches."""
    left_out = {"name", "data", "store", "batch", "target"}  # prompts, unit, batch, pair say it
    settings = {
        "spec": portable(job.spec.model_dump(mode="json", exclude=left_out)),
        "prompts": job.prompts.digest,
        "sites": job.sites,
        "unit": plan.unit,
        "batch": plan.batch,
    }
    reader = job.reader
    return fingerprint(reader.subject, settings, job.spec.seed_list, reader.tokenizer)
