"""The plan of a harvest: units and batches, with what they will take."""

import time
from dataclasses import dataclass

from dreamreader.errors import InvalidInput
from dreamreader.harvest.capture import Counter, Taken
from dreamreader.harvest.job import HarvestJob
from dreamreader.harvest.paired import run_batch
from dreamreader.specs.batch import activation_bytes, duration, rows_that_fit
from dreamreader.store.layout import tensors_of

MIB = 2**20
GB = 10**9
_TIMED = 4  # samples that are run to learn sizes and time
_TIMED_TEXTS = 8


@dataclass(frozen=True)
class Estimate:
    """What a sample gives and takes, from running a few.

    Attributes:
        taken: rows of each site. samples: how many were run.
        bytes: on disk, per sample. seconds: per sample.
    """

    taken: tuple[Taken, ...]
    samples: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class HarvestPlan:
    """What a harvest will do.

    Attributes:
        samples: prompts x seeds. unit: samples of a unit. batch: samples of one call.
        estimate: of rows, bytes and time; None where nothing had to be run for the plan.
    """

    samples: int
    unit: int
    batch: int
    estimate: Estimate | None = None

    @property
    def units(self) -> int:
        return -(-self.samples // self.unit)

    def range_of(self, unit: int) -> tuple[int, int]:
        """First sample of a unit, and one after its last."""
        return unit * self.unit, min((unit + 1) * self.unit, self.samples)

    def __repr__(self) -> str:
        lines = [
            f"samples   {self.samples:,}",
            f"units     {self.units:,} of up to {self.unit:,} samples, in batches of up to "
            f"{min(self.batch, self.unit)}",
        ]
        found = self.estimate
        if found is None:
            return "\n".join(lines)
        share = self.samples / found.samples
        rows = sum(each.rows for each in found.taken)
        kinds = _group_sites(found.taken, found.samples)
        lines += [
            f"sites     {len(found.taken):,}",
            *(f"          {line}" for line in kinds[:12]),
            *([f"          ... {len(kinds) - 12} more"] if len(kinds) > 12 else []),
            f"rows      about {rows * share:,.0f}",
            f"disk      about {found.bytes * self.samples / GB:.3g} GB",
            f"time      about {duration(found.seconds * self.samples)}",
        ]
        return "\n".join(lines)


Plan = HarvestPlan  # its name before


def make_plan(
    job: HarvestJob, unit: int | None = None, batch: int | None = None, estimates: bool = True
) -> HarvestPlan:
    """Makes the plan of a job.

    Args:
        unit, batch: of a plan that was made before; by the spec, the memory and the size of rows
            otherwise.
        estimates: runs a few samples to learn rows, bytes and time. Without, they are run only
            where the size of a unit depends on them.

    Raises:
        InvalidInput, ClockUnknown, NeverFired: the captures do not fit the subject.
    """
    spec = job.spec
    unit = spec.store.unit if isinstance(spec.store.unit, int) else unit
    batch = spec.batch.rows if isinstance(spec.batch.rows, int) else batch
    if job.generates:
        # Beside longer ones, a text that has ended would be followed by padding.
        if batch not in (None, 1):
            raise InvalidInput(
                f"batch.rows: {batch} texts that are generated end at different places, so each is "
                "run alone; leave it out"
            )
        batch = 1
    if batch is None:
        batch = rows_that_fit(spec.batch, max(map(_row_bytes, job.sides)))
    found = estimate_units(job, batch) if estimates or unit is None else None
    if unit is None:
        assert found is not None
        fitting = int(spec.store.shard_mb * MIB // max(found.bytes, 1))
        unit = fitting // batch * batch if fitting >= batch else max(fitting, 1)
        unit = min(unit, job.samples)
    return HarvestPlan(job.samples, unit, batch, found)


def estimate_units(job: HarvestJob, batch: int) -> Estimate:
    """Runs the first samples, to count their rows and bytes, and the time that they take."""
    count = min(job.samples, _TIMED_TEXTS if job.is_language else min(batch, _TIMED))
    collectors = [side.collector(Counter()) for side in job.sides]
    for each in collectors:
        each.begin(0)
    items, seeds = job.read(0, count)
    began = time.perf_counter()
    for first in range(0, count, batch):
        for each in collectors:
            each.batch(first)
        part = slice(first, first + batch)
        run_batch(job, items[part], seeds[part], collectors)
    seconds = (time.perf_counter() - began) / count
    taken = tuple(site for each in collectors for site in each.taken.values())
    empty = sum(tensors_of(each.layout, 0, 0, 0).bytes for each in taken)
    size = sum(each.nbytes for each in collectors)
    return Estimate(taken, count, (size - empty) / count, seconds)


def _row_bytes(job: HarvestJob) -> float:
    """Bytes of activations of one sample, from running one for a single step."""
    items, seeds = job.read(0, 1)
    changes = {} if job.is_language else {"num_inference_steps": 1}
    found = activation_bytes(job.reader.subject, lambda: job.run(items, seeds, (), **changes))
    if job.spec.max_tokens is None or job.reader.tokenizer is None:
        return found
    length = len(job.reader.tokenizer(items[0].prompt).input_ids)
    return found * max(1.0, job.spec.max_tokens / max(length, 1))


def _group_sites(taken: tuple[Taken, ...], samples: int) -> list[str]:
    """Sites of one width and dtype, with equally many rows, in one line."""
    groups: dict[tuple[int, str, int], list[str]] = {}
    for each in taken:
        kind = str(each.layout.stored).removeprefix("torch.")
        groups.setdefault((each.layout.width, kind, each.rows), []).append(each.layout.name)
    return [
        f"{len(names)} of width {width}, {kind}, {rows / samples:,.6g} rows a sample: {names[0]}"
        + (" ..." if len(names) > 1 else "")
        for (width, kind, rows), names in groups.items()
    ]
