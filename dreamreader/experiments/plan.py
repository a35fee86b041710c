"""The plan of a run: rows and batches, with what they will take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job
from dreamreader.experiments.row import Row, Unit

MOST_ROWS = 48  # in one call; more gain nothing on a CPU and little on a GPU
TIMED_ROWS = 4
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        rows: all of them. units: which are run in one call.
        row_bytes: activations that a row takes, estimated from one row of one step; 0 if unknown.
        seconds: estimated time of the whole run; 0 if unknown.
        conditions: rows of each condition. sites: sites that are edited or read.
    """

    rows: list[Row]
    units: list[Unit]
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
                f"memory    about {self.batch * self.row_bytes / _GIB:.2g} GiB for activations",
                f"time      about {_duration(self.seconds)}",
            ]
        )


def make_plan(job: Job, batch: int | None = None, estimates: bool = True) -> Plan:
    """Makes the rows of a job and groups them into batches.

    Args:
        job: gets its `batch`.
        batch: rows of one call, of a plan that was made before; by the spec and memory otherwise.
        estimates: runs a few rows for a few steps, to learn the size of activations and the time.
            Without, one row is run for a step where the batch depends on its size, else none.

    Raises:
        InvalidInput: the memory allowed does not hold a single row, or a sweep is too long.
    """
    job.spec.method.check(job)
    sized = estimates or (batch is None and job.spec.batch.rows == "auto")
    with job.uncounted():
        row_bytes = probe(job) if sized else 0
        seconds = time_of_row(job) if estimates else 0.0
    job.use_batch(batch or _rows_that_fit(job, row_bytes))
    rows = job.rows
    _check_axes(rows)
    conditions: dict[str, int] = {}
    for row in rows:
        conditions[row.condition] = conditions.get(row.condition, 0) + 1
    sites = list(dict.fromkeys(site for row in rows if row.cell for site in row.cell.sites))
    return Plan(rows, job.units, row_bytes, seconds * len(rows), conditions, sites)


def _check_axes(rows: Sequence[Row]) -> None:
    """Refuse columns of the data that the method makes as well."""
    for row in rows:
        for name in row.axes:
            if name in row.item.columns:
                raise InvalidInput(
                    f"data: the column {name!r} is also an axis of the method; rename one of them"
                )


def probe(job: Job) -> int:
    """Bytes of activations of one row, from running one for a single step.

    An estimate from what modules give: three times the largest result, and half of all others,
    which residual connections and attention may hold at the same time.
    """
    sizes: list[int] = []

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        sizes.append(sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor)))

    subject: Any = job.reader.subject
    parts = getattr(subject, "components", {"": subject}).values()
    leaves = [
        module
        for part in parts
        if isinstance(part, nn.Module)
        for module in part.modules()
        if not any(True for _ in module.children())
    ]
    handles = [module.register_forward_hook(measure) for module in leaves]
    changes: dict[str, Any] = {} if job.is_language else {"num_inference_steps": 1}
    try:
        job.draw([job.items[0].prompt], [0], **changes)
    finally:
        for handle in handles:
            handle.remove()
    return 3 * max(sizes, default=0) + sum(sizes) // 2


def time_of_row(job: Job) -> float:
    """Seconds of one row in a batch, without edits, from a run of one step and one of three."""
    rows = [job.items[0].prompt] * TIMED_ROWS

    def timed(changes: dict[str, Any]) -> float:
        began = time.perf_counter()
        job.draw(rows, [0] * len(rows), **changes)
        return time.perf_counter() - began

    if job.is_language:
        return timed({}) / len(rows)
    once, thrice = (timed({"num_inference_steps": n}) for n in (1, 3))
    step = max(thrice - once, 0.0) / 2
    return (max(once - step, 0.0) + step * (job.steps or 1)) / len(rows)


def _rows_that_fit(job: Job, row_bytes: int) -> int:
    wanted = job.spec.batch.rows
    if isinstance(wanted, int):
        return wanted
    from dreamreader.engine.recorder import _available as available

    limit = job.spec.batch.memory
    allowed = limit * _GIB if limit is not None else available() / 2
    fitting = int(allowed // max(row_bytes, 1))
    if fitting < 1:
        raise InvalidInput(
            f"batch.memory: one row takes about {row_bytes / _GIB:.2g} GiB, {allowed / _GIB:.2g} "
            "GiB are allowed"
        )
    return min(fitting, MOST_ROWS)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
