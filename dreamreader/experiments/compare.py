"""Comparing runs: what differs between two, and whether one can be repeated."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamreader._progress import Progress, show_progress, track
from dreamreader.errors import InvalidInput
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.job import Job
from dreamreader.experiments.row import RowBatch
from dreamreader.experiments.run import begin, compute
from dreamreader.jobs.differences import Difference, JobDifference, differences

_NOT_RESULTS = {"row", "seed", "base", "unit", "strength"}


@dataclass(frozen=True)
class RunDifference(JobDifference):
    """What differs between two runs.

    Attributes:
        results: (condition and metric, mean in the first, mean in the second).
        same_rows: rows whose output is equal to the bit, of those that both have.
        rows: rows of the first, of the second.
    """

    same_rows: int
    rows: tuple[int, int]

    @property
    def metrics(self) -> list[Difference]:
        """The results, which are metrics here."""
        return self.results

    @property
    def is_same(self) -> bool:
        return super().is_same and self.same_rows == self.rows[0] == self.rows[1]

    @property
    def lines(self) -> list[str]:
        return [
            f"rows: {self.rows[0]:,} and {self.rows[1]:,}; {self.same_rows:,} of "
            f"{min(self.rows):,} give the same output to the bit"
        ]


def diff(first: Path, second: Path) -> RunDifference:
    """Compares two complete run folders.

    Raises:
        InvalidInput: one is no complete run folder, or is damaged.
    """
    folders = RunFolder(first), RunFolder(second)
    rows = [folder.table()[0] for folder in folders]
    means = [condition_means(each) for each in rows]
    digests = [{row["row"]: row["digest"] for row in each} for each in rows]
    shared = digests[0].keys() & digests[1].keys()
    return RunDifference(
        **folders[0].differs(folders[1]),
        results=list(differences(means[0], means[1])),
        same_rows=sum(digests[0][n] == digests[1][n] for n in shared),
        rows=(len(rows[0]), len(rows[1])),
    )


def condition_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of every number and truth value of the rows, by condition: {"edited, tint": 0.4}."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_RESULTS and isinstance(value, bool | int | float):
                found.setdefault(f"{row['condition']}, {name}", []).append(float(value))
    return {name: round(float(np.mean(values)), 6) for name, values in found.items()}


@dataclass(frozen=True)
class Verdict:
    """Whether rows could be repeated.

    Attributes:
        checked: numbers of the rows that were run again.
        different: of these, (row, column, value in the folder, value now).
    """

    checked: list[int]
    different: list[tuple[int, str, Any, Any]]

    @property
    def holds(self) -> bool:
        return not self.different


def verify(
    job: Job, folder: RunFolder, count: int, seed: int = 0, progress: Progress = True
) -> Verdict:
    """Runs the batches of a random sample of rows again and compares every value, to the bit.

    A row is repeated with its whole batch, since the result may depend on the shapes computed.

    Args:
        job: opened from the folder's spec.
        folder: a complete run.
        count: rows to check. seed: of the sample.
        progress: shown by default, or a function of a `ProgressEvent`, or False.

    Raises:
        InvalidInput: the folder is no complete run, or is of another subject, code or version.
    """
    written = {row["row"]: row for row in folder.table()[0]}
    plan = begin(job, folder)
    if count < 1:
        raise InvalidInput(f"verify: count must be at least 1, got {count}")
    sample = random.Random(seed).sample(sorted(written), min(count, len(written)))
    wanted: list[RowBatch] = [u for u in plan.units if any(u.start <= n < u.stop for n in sample)]
    different = []
    with show_progress(progress) as report:
        job.spec.method.prepare(job)
        for unit in track(wanted, "batches", report):
            for row in compute(job, unit, keep=False)[0]:
                if row["row"] in sample:
                    old = written[row["row"]]
                    different += [
                        (row["row"], name, old.get(name), value)
                        for name, value in row.items()
                        if not _same(old.get(name), value)
                    ]
    return Verdict(sorted(sample), different)


def shorten_value(value: Any) -> str:
    """A value in short."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and a != a and b != b)
