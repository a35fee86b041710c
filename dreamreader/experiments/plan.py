"""The plan of a run: rows and batches, with what they will take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.job import Job
from dreamreader.experiments.row import Row, RowBatch
from dreamreader.metrics.matches import Matches
from dreamreader.metrics.registry import numbers_of
from dreamreader.specs.batch import GIB, activation_bytes, duration, rows_that_fit

TIMED_ROWS = 4


@dataclass(frozen=True)
class ExperimentPlan:
    """What a run will do.

    Attributes:
        rows: all of them. units: which are run in one call.
        row_bytes: activations that a row takes, estimated from one row of one step; 0 if unknown.
        seconds: estimated time of the whole run; 0 if unknown.
        conditions: rows of each condition. sites: sites that are edited or read.
    """

    rows: list[Row]
    units: list[RowBatch]
    row_bytes: int
    seconds: float
    conditions: dict[str, int]
    sites: list[str]

    @property
    def batch(self) -> int:
        return max(unit.stop - unit.start for unit in self.units)

    def __repr__(self) -> str:
        listed = ", ".join(f"{count:,} {name}" for name, count in self.conditions.items())
        sites = self.sites[:6] + (
            [f"... {len(self.sites) - 6} more"] if len(self.sites) > 6 else []
        )
        return "\n".join(
            [
                f"rows      {len(self.rows):,}: {listed}",
                f"batches   {len(self.units):,} of up to {self.batch} rows",
                f"sites     {len(self.sites)}" + "".join(f"\n          {each}" for each in sites),
                f"memory    about {self.batch * self.row_bytes / GIB:.2g} GiB for activations",
                f"time      about {duration(self.seconds)}",
            ]
        )


def make_plan(job: Job, batch: int | None = None, estimates: bool = True) -> ExperimentPlan:
    """Makes the rows of a job and groups them into batches.

    Args:
        job: gets its `batch`.
        batch: rows of one call, of a plan that was made before; by the spec and memory otherwise.
        estimates: runs a few rows for a few steps, to learn the size of activations and the time.
            Without, one row is run for a step where the batch depends on its size, else none.

    Raises:
        InvalidInput: the memory allowed does not hold a single row, or a sweep is too long.
    """
    _check_effect(job)
    job.spec.method.check(job)
    sized = estimates or (batch is None and job.spec.batch.rows == "auto")
    with job.pause_counting():
        row_bytes = probe(job) if sized else 0
        job.use_batch(batch or rows_that_fit(job.spec.batch, row_bytes))
        seconds = time_of_row(job, min(job.batch, len(job.rows))) if estimates else 0.0
    rows = job.rows
    _check_axes(rows)
    for metric in job.metrics:
        if isinstance(metric, Matches):
            metric.check([row.columns() for row in rows])
    conditions: dict[str, int] = {}
    for row in rows:
        conditions[row.condition] = conditions.get(row.condition, 0) + 1
    sites = list(dict.fromkeys(site for row in rows if row.cell for site in row.cell.sites))
    return ExperimentPlan(rows, job.units, row_bytes, seconds * len(rows), conditions, sites)


def _check_effect(job: Job) -> None:
    """Refuse an effect that no metric of the spec gives, where all say what they give."""
    effect = getattr(job.spec.method, "effect", None)
    known = [numbers_of(metric) for metric in job.metrics]
    if effect is None or None in known:
        return
    names = [name for each in known if each is not None for name in each]
    if not names:
        raise InvalidInput(f"method.effect: {effect!r} is a column of a metric; name it in metrics")
    if effect not in names:
        raise UnknownName("method.effect: number that the metrics give", effect, names)


def _check_axes(rows: Sequence[Row]) -> None:
    """Refuse columns of the data that the method makes as well."""
    for row in rows:
        for name in row.axes:
            if name in row.item.columns:
                raise InvalidInput(
                    f"data: the column {name!r} is also an axis of the method; rename one of them"
                )


def probe(job: Job) -> int:
    """Bytes of activations of one row, from running one for a single step."""
    changes: dict[str, Any] = {} if job.is_language else {"num_inference_steps": 1}
    return activation_bytes(
        job.reader.subject, lambda: job.draw([job.items[0].prompt], [0], **changes)
    )


def time_of_row(job: Job, batch: int) -> float:
    """Seconds of one row in a batch of so many, without edits.

    What a call takes whatever its rows, and a denoiser's run whatever its steps, is told apart by
    two runs: of a few rows, or few steps, and of more.
    """

    def time_call(rows: int, **changes: Any) -> float:
        began = time.perf_counter()
        job.draw([job.items[0].prompt] * rows, [0] * rows, **changes)
        return time.perf_counter() - began

    if job.is_language:
        few, many = time_call(1), time_call(TIMED_ROWS)
        row = max(many - few, 0.0) / (TIMED_ROWS - 1)
        return row + max(few - row, 0.0) / batch
    once, thrice = (time_call(TIMED_ROWS, num_inference_steps=n) for n in (1, 3))
    step = max(thrice - once, 0.0) / 2
    return (max(once - step, 0.0) + step * (job.steps or 1)) / TIMED_ROWS
