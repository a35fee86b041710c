"""Comparing runs: what differs between two, and whether one can be repeated."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamreader.errors import InvalidInput
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.job import Job
from dreamreader.experiments.row import Unit
from dreamreader.experiments.run import begun, computed
from dreamreader.jobs.differences import Difference, differences
from dreamreader.jobs.folder import FINGERPRINT

_NOT_RESULTS = {"row", "seed", "base", "unit", "strength"}


@dataclass(frozen=True)
class RunDifference:
    """What differs between two runs.

    Attributes:
        spec, machine: (field, in the first, in the second).
        fingerprint: differences of weights, code, packages and seeds.
        metrics: (condition and metric, mean in the first, mean in the second).
        same_rows: rows whose output is equal to the bit, of those that both have.
        rows: rows of the first, of the second.
    """

    spec: list[Difference]
    fingerprint: list[Difference]
    machine: list[Difference]
    metrics: list[Difference]
    same_rows: int
    rows: tuple[int, int]


def diff(first: Path, second: Path) -> RunDifference:
    """Compares two complete run folders.

    Raises:
        InvalidInput: one is no complete run folder, or is damaged.
    """
    folders = RunFolder(first), RunFolder(second)
    rows = [folder.table()[0] for folder in folders]
    specs = [folder.spec() for folder in folders]
    taken = [folder.need(FINGERPRINT) for folder in folders]
    parts = ("weights", "subject", "code", "packages", "seeds")
    hashed = [{name: each.get(name) for name in parts} for each in taken]
    means = [condition_means(each) for each in rows]
    digests = [{row["row"]: row["digest"] for row in each} for each in rows]
    shared = digests[0].keys() & digests[1].keys()
    return RunDifference(
        list(differences(specs[0], specs[1])),
        list(differences(hashed[0], hashed[1])),
        list(differences(*(each.get("machine", {}) for each in taken))),
        list(differences(means[0], means[1])),
        sum(digests[0][n] == digests[1][n] for n in shared),
        (len(rows[0]), len(rows[1])),
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
    job: Job, folder: RunFolder, count: int, seed: int = 0, progress: Callable[..., Any] = iter
) -> Verdict:
    """Runs the batches of a random sample of rows again and compares every value, to the bit.

    A row is repeated with its whole batch, since the result may depend on the shapes computed.

    Args:
        job: opened from the folder's spec.
        folder: a complete run.
        count: rows to check. seed: of the sample.
        progress: wraps the list of batches.

    Raises:
        InvalidInput: the folder is no complete run, or is of another subject, code or version.
    """
    written = {row["row"]: row for row in folder.table()[0]}
    plan = begun(job, folder)
    if count < 1:
        raise InvalidInput(f"verify: count must be at least 1, got {count}")
    sample = random.Random(seed).sample(sorted(written), min(count, len(written)))
    wanted: list[Unit] = [u for u in plan.units if any(u.start <= n < u.stop for n in sample)]
    job.spec.method.prepare(job)
    different = []
    for unit in progress(wanted):
        for row in computed(job, unit, keep=False)[0]:
            if row["row"] in sample:
                old = written[row["row"]]
                different += [
                    (row["row"], name, old.get(name), value)
                    for name, value in row.items()
                    if not _same(old.get(name), value)
                ]
    return Verdict(sorted(sample), different)


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and a != a and b != b)
