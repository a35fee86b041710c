"""What the methods share whose changed rows take activations from other rows of a chunk."""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.row import Row, turn_apart
from dreamreader.sweep import Cell, records_of

_HELD = 2  # chunks of activations: clean and corrupted


class Chunked(Method):
    """Runs chunks of prompts: first the rows that give, then every cell with what they gave.

    Rows of a chunk that give are one group and one batch. The activations of a chunk are held in
    memory until the next one; where a stopped run goes on within a chunk they are made again.
    """

    base: ClassVar[str]  # conditions: not changed, changed, changed as a control
    changed: ClassVar[str]
    control: ClassVar[str]
    goal: ClassVar[str | None] = None  # condition at the other end of the way

    effect: str | None = Field(
        None, description="Column of a metric that the effect is formed of; the first that changes."
    )

    def gives(self, condition: str) -> bool:
        """Whether the activations of these rows are taken by others."""
        raise NotImplementedError

    def read_cells(self, job: Job) -> list[Cell]:
        """The cells whose sites are recorded."""
        raise NotImplementedError

    def records(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        return records_of(self.read_cells(job)) if self.gives(rows[0].condition) else []

    def columns(self, job: Job, rows: Sequence[Row], result: Any) -> dict[str, list[Any]]:
        if self.gives(rows[0].condition):
            _hold(job, rows[0].group, result.cache)
        return {}

    def source(self, job: Job, group: int) -> Any:
        """Activations of a group of rows that give."""
        held = job.memory.setdefault("sources", {})
        if group not in held:
            with job.pause_counting():
                _, result = job.run_batch([row for row in job.rows if row.group == group])
            _hold(job, group, result.cache)
        return held[group]


def others(rows: Sequence[Row], source: Any) -> list[int]:
    """For each row the entry of a source's row with another prompt, as far as there is one."""
    given = next(iter(source.values())).rows
    shift = turn_apart([row.prompt for row in given])
    return [(row.entry + shift) % len(given) for row in rows]


def _hold(job: Job, group: int, cache: Any) -> None:
    held = job.memory.setdefault("sources", {})
    held.pop(group, None)
    held[group] = cache
    for old in list(held)[:-_HELD]:  # by age: a run can go back to an earlier chunk
        del held[old]
