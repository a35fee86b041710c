"""Experiments in Python: the same specs as objects."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.job import Job, open_job
from dreamreader.experiments.load import load_results, load_spec
from dreamreader.experiments.methods import Spec
from dreamreader.experiments.plan import Plan, make_plan
from dreamreader.experiments.results import Results
from dreamreader.specs.load import spec_of

if TYPE_CHECKING:
    from dreamreader.engine import Reader
    from dreamreader.metrics import Metric

RUNS = Path("runs")


class Experiment:
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
        ...     method={"kind": "patch", "sites": "unet.**.attn2", "branch": "cond"},
        ...     metrics=[{"tint": {"source": "red", "target": "blue"}}],
        ... )
        >>> experiment.run("runs/red-to-blue").mean("patched", "tint")
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Any] | None = None,
        *,
        reader: "Reader | None" = None,
        metrics: "Sequence[Metric | str | Mapping[str, Any]]" = (),
        **fields: Any,
    ):
        named = [each for each in metrics if isinstance(each, str | Mapping)]
        self._metrics = [each for each in metrics if not isinstance(each, str | Mapping)]
        self._reader = reader
        if named:
            listed = spec.get("metrics", ()) if isinstance(spec, Mapping) else ()
            fields["metrics"] = [*listed, *named]
        self.spec = spec_of(Spec, spec, fields, reader, "Experiment")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "Experiment":
        """Reads a spec file; see `load_spec`."""
        return cls(load_spec(path, overrides))

    @cached_property
    def job(self) -> Job:
        """The opened subject, data and metrics."""
        return open_job(self.spec, self._reader, self._metrics)

    @property
    def folder(self) -> Path:
        """Where the run goes by default: `runs/<name>`."""
        words = re.sub(r"[^a-z0-9]+", "-", self.spec.name.lower()).strip("-")
        return RUNS / (words or "run")

    def plan(self) -> Plan:
        """Rows, batches, sites, and what they will take; one step of one row is run."""
        return make_plan(self.job)

    def run(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        started: Callable[[Plan, int], Any] | None = None,
        advance: Callable[[float], Any] | None = None,
    ) -> Results:
        """Runs what is missing, writes the report, and gives the results.

        Args:
            out: the run folder, `runs/<name>` by default. A stopped run goes on there; a complete
                one is left as it is.
            started: called with the plan and the number of rows that are there already.
            advance: called with the share of rows that was finished, as it happens.

        Raises:
            InvalidInput: the folder holds another run, is in use, damaged or cannot be written.
        """
        from dreamreader.experiments.page import write_report
        from dreamreader.experiments.run import run_job

        folder = RunFolder(Path(out) if out is not None else self.folder)
        if advance is not None:
            self.job.advance = advance
        run_job(self.job, folder, started)
        results = load_results(folder.path)
        if not (folder.path / "report.html").is_file():
            write_report(results)
        return results

    def __repr__(self) -> str:
        spec = self.spec
        return f"Experiment({spec.name!r}: {spec.method.kind} on {spec.subject.model})"
