"""Experiments in Python: the same specs as objects."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamreader._progress import Progress
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.experiments.compare import (
    RunDifference,
    condition_means,
    diff,
    shorten_value,
    verify,
)
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.job import Job, open_job
from dreamreader.experiments.load import load_results
from dreamreader.experiments.methods import Spec
from dreamreader.experiments.page import summary, write_report
from dreamreader.experiments.plan import ExperimentPlan, make_plan
from dreamreader.experiments.results import Results
from dreamreader.experiments.run import begin, check_metrics, compute
from dreamreader.jobs.job import JobVerdict, RunUnit, SpecJob, Work
from dreamreader.metrics import Metric


class Experiment(SpecJob[Spec]):
    """A spec with the subject it is about: plan it, run it, read its results.

    Args:
        spec: a `Spec`, or its content as a mapping; or give the fields by name.
        reader: a subject of your own; `subject` then only names it.
        metrics: metrics as objects, beside those that the spec names.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> experiment = Experiment(
        ...     name="red to blue", subject="shapes-unet",
        ...     data={"pairs": [{"source": "a red star", "target": "a blue star"}]},
        ...     method={"kind": "patch", "sites": "unet.mid_block.**.attn2", "branch": "cond"},
        ...     metrics=[{"tint": {"source": "red", "target": "blue"}}],
        ... )
        >>> tint = experiment.run("runs/red-to-blue").mean("patched", "tint")
    """

    kind, model, folder_type = "experiment", Spec, RunFolder
    counts, divides = "rows", True

    def __init__(
        self,
        spec: Spec | Mapping[str, Any] | None = None,
        *,
        reader: Reader | None = None,
        home: Path | None = None,
        metrics: Sequence[Metric | str | Mapping[str, Any]] = (),
        **fields: Any,
    ):
        named = [each for each in metrics if isinstance(each, str | Mapping)]
        self._metrics = [each for each in metrics if not isinstance(each, str | Mapping)]
        if named:
            listed = spec.get("metrics", ()) if isinstance(spec, Mapping) else ()
            fields["metrics"] = [*listed, *named]
        super().__init__(spec, reader=reader, home=home, **fields)

    @cached_property
    def job(self) -> Job:
        """The opened subject, data and metrics."""
        return open_job(self.spec, self._reader, self._metrics)

    def plan(self) -> ExperimentPlan:
        """Rows, batches, sites, and what they will take; one step of one row is run."""
        plan = make_plan(self.job)
        check_metrics(self.job)
        return plan

    def open(self) -> None:
        self.job  # noqa: B018

    def check_divides(self) -> None:
        super().check_divides()
        if self._metrics:
            raise InvalidInput(
                "Experiment: an engine opens the metrics in other processes, by their names; name "
                "them in the spec"
            )

    def begin(self, folder: RunFolder) -> ExperimentPlan:
        plan = begin(self.job, folder)
        check_metrics(self.job)
        return plan

    def units(self, plan: ExperimentPlan) -> int:
        return len(plan.units)

    def size(self, plan: ExperimentPlan, unit: int) -> int:
        return plan.units[unit].stop - plan.units[unit].start

    def units_there(self, folder: RunFolder, plan: ExperimentPlan) -> set[int]:
        return (
            set(range(len(plan.units))) if folder.is_complete else folder.finished_units(plan.units)
        )

    def check_there(self, work: Work, there: set[int]) -> None:
        if not work.folder.is_complete:
            for unit in there:
                work.folder.read_unit(work.plan.units[unit])

    def needs(self, plan: ExperimentPlan, unit: int) -> set[int]:
        """Batches with rows that those of this one are compared with."""
        if not any(metric.compares for metric in self.job.metrics):
            return set()
        bases = [row.base for row in plan.units[unit].of(plan.rows) if row.base is not None]
        return {self.job.unit_of(base).number for base in bases} - {unit}

    def opening(self, work: Work) -> str:
        there = f" ({work.done:,} are there)" if work.done else ""
        batches = f"{len(work.plan.units):,} batches of {work.plan.batch}"
        return f"{work.total:,} rows{there} in {batches}"

    def prepare(self, work: Work) -> None:
        with self.job.pause_counting():
            self.spec.method.prepare(self.job)

    @contextmanager
    def open_runner(self, work: Work) -> Iterator[RunUnit]:
        job, folder = self.job, work.folder

        def run_unit(number: int, room: int | None) -> int:
            unit = work.plan.units[number]
            folder.write_unit(unit, *compute(job, unit))
            return 0

        with job.count_rows(work.advance):
            yield run_unit

    def finish(self, work: Work) -> None:
        work.folder.merge(work.plan.units)

    def clear(self, work: Work) -> None:
        work.folder.clear(work.plan.units)

    def result(self, folder: RunFolder) -> Results:
        """What was found."""
        return load_results(folder.path)

    @classmethod
    def write_report(cls, folder: RunFolder) -> Path:
        return write_report(load_results(folder.path))

    @classmethod
    def results(cls, folder: RunFolder) -> Mapping[str, Any]:
        return condition_means(folder.table()[0])

    @classmethod
    def summary(cls, folder: RunFolder) -> list[str]:
        return summary(load_results(folder.path))

    @classmethod
    def diff(cls, first: str | Path, second: str | Path) -> RunDifference:
        return diff(Path(first), Path(second))

    @classmethod
    def verify(
        cls, path: str | Path, rows: int = 8, seed: int = 0, progress: Progress = True
    ) -> JobVerdict:
        """Repeats a random sample of rows, and compares every value to the bit."""
        found = verify(
            open_job(load_results(path).spec), RunFolder(Path(path)), rows, seed, progress
        )
        if found.holds:
            return JobVerdict(True, [f"{len(found.checked)} rows repeated, all equal to the bit"])
        wrong = len({row for row, *_ in found.different})
        listed = [
            f"{row:>6}  {name}: {shorten_value(old)} in the folder, {shorten_value(new)} now"
            for row, name, old, new in found.different
        ]
        last = f"{wrong} of {len(found.checked)} repeated rows differ"
        return JobVerdict(False, [f"{'row':>6}", *listed, last])

    def __repr__(self) -> str:
        spec = self.spec
        return f"Experiment({spec.name!r}: {spec.method.kind} on {spec.subject.model})"
