"""Probes from a spec file: on activations of prompts, or on those that a store holds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader.jobs import Fingerprint, fingerprint
from dreamreader.jobs.fingerprint import fingerprint_of_rows, portable
from dreamreader.jobs.job import REPORT, RunUnit, SpecJob, Work
from dreamreader.probes import Probe
from dreamreader.training.folder import RESULT, TrainingFolder, notes_file, probe_name
from dreamreader.training.probe_page import held_out_scores, write_report
from dreamreader.training.prompted import Prompted
from dreamreader.training.specs import ProbeSpec as ProbeSpec
from dreamreader.training.stored import Stored


@dataclass(frozen=True)
class ProbePlan:
    """A probe for each of the sites, from calls of `batch` rows."""

    sites: Sequence[str]
    batch: int


class ProbeJob(SpecJob[ProbeSpec]):
    """Trains the probes of a spec, one at each site.

    Args:
        spec: a `ProbeSpec`, or its content as a mapping; or give the fields by name.
        reader: a subject of your own; `subject` then only names it.
        home: what a relative `store` is meant from.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> job = ProbeJob.from_file("examples/probes/colour.yaml")
        >>> probes = job.run("colour")  # doctest: +SKIP
        >>> edit = probes["unet.mid_block"].guidance(target="blue")  # doctest: +SKIP
    """

    kind, model, folder_type = "probes", ProbeSpec, TrainingFolder

    @cached_property
    def source(self) -> Prompted | Stored:
        """Where rows and labels come from."""
        if self.spec.store is None:
            return Prompted(self.spec, self._reader)
        return Stored(self.spec, (self._home or Path()) / self.spec.store)

    def plan(self) -> str:
        """Sites, rows, labels and time, in lines; refuses what `run` would."""
        self.open()
        return self.source.plan()

    def open(self) -> None:
        self.source.check()

    def begin(self, folder: TrainingFolder) -> ProbePlan:
        """Sites, and rows of a call as the folder has it from before."""
        plan = folder.plan()
        batch = plan["batch"] if plan else self.source.batch()
        shown = self.spec.model_dump(
            mode="json", exclude={"name", "data", "store", "seeds", "batch"}
        )
        settings = {"spec": portable(shown), "batch": batch, **self.source.identity()}
        folder.begin(self.spec, self._fingerprint(settings), {"batch": batch})
        return ProbePlan(self.source.sites, batch)

    def units(self, plan: ProbePlan) -> int:
        return len(plan.sites)

    def units_there(self, folder: TrainingFolder, plan: ProbePlan) -> set[int]:
        return {n for n, site in enumerate(plan.sites) if _is_trained(folder, site)}

    @contextmanager
    def open_runner(self, work: Work) -> Iterator[RunUnit]:
        folder: TrainingFolder = work.folder
        sites = [work.plan.sites[unit] for unit in work.missing]
        trained = self.source.train(sites, work.plan.batch, work.report)

        def train_next(unit: int, room: int | None) -> int:
            site, probe, notes = next(trained)
            own = {"run": folder.run, "card": probe.card.as_dict()}
            folder.write(notes_file(site), {**own, **notes})
            with explain_disk_errors(folder.path):
                probe.save(folder.path / probe_name(site))
            return 0

        yield train_next
        next(trained, None)  # it reports the last one

    def finish(self, work: Work) -> None:
        sites = work.plan.sites
        names = [name for site in sites for name in (probe_name(site), notes_file(site))]
        if not work.folder.is_complete:
            work.folder.complete({"sites": list(sites)}, names)

    def result(self, folder: TrainingFolder) -> dict[str, Probe]:
        """The probes by site."""
        return {
            site: Probe.load(folder.path / probe_name(site))
            for site in folder.need(RESULT)["sites"]
        }

    @classmethod
    def write_report(cls, folder: TrainingFolder) -> Path:
        return write_report(cls.of_folder(folder.path).spec, folder)

    @classmethod
    def results(cls, folder: TrainingFolder) -> Mapping[str, Any]:
        sites = folder.need(RESULT)["sites"]
        return {site: folder.need(notes_file(site))["card"]["held_out"] for site in sites}

    @classmethod
    def summary(cls, folder: TrainingFolder) -> list[str]:
        folder.need_complete()
        sites, name = folder.need(RESULT)["sites"], cls.of_folder(folder.path).spec.name
        return [
            f"{name}: {len(sites)} probes",
            *(f"  {s}: {_describe_scores(Probe.load(folder.path / probe_name(s)))}" for s in sites),
            f"report: {(folder.path / REPORT).resolve()}",
        ]

    def _fingerprint(self, settings: Mapping[str, Any]) -> Fingerprint:
        reader = self.source.reader
        if reader is not None:
            return fingerprint(reader.subject, settings, self.spec.seed_list, reader.tokenizer)
        return fingerprint_of_rows(settings)

    def __repr__(self) -> str:
        spec = self.spec
        of = spec.store if spec.subject is None else spec.subject.model
        return f"ProbeJob({spec.name!r}: {spec.probe.task} on {of})"


def _is_trained(folder: TrainingFolder, site: str) -> bool:
    """Whether the probe of a site is there, as this job trained it."""
    notes, file = folder.read(notes_file(site)), folder.path / probe_name(site)
    if notes is None or notes["run"] != folder.run or not file.is_file():
        return False
    return Probe.load(file).card.as_dict() == notes["card"]


def _describe_scores(probe: Probe) -> str:
    kind = "R2" if probe.task.kind == "regress" else "accuracy"
    shown = "{:.3f}" if kind == "R2" else "{:.1%}"
    return ", ".join(
        f"{kind}{' of ' + name if name else ''} {shown.format(value)}"
        for name, value in held_out_scores(probe.card).items()
    )
