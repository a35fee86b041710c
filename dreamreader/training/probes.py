"""Probes from a spec file: on activations of prompts, or on those that a store holds."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from dreamreader._files import explained
from dreamreader.errors import DreamreaderError
from dreamreader.jobs import Fingerprint, fingerprint
from dreamreader.jobs.fingerprint import portable
from dreamreader.probes import Probe
from dreamreader.specs.call import CallArguments
from dreamreader.specs.load import load_spec, spec_of
from dreamreader.specs.parts import AnySeeds, AnySubject, Batch, Data, Part, Seeds, listed_seeds
from dreamreader.store.layout import file_of
from dreamreader.training.folder import TrainingFolder
from dreamreader.training.labels import Named, check_detected, from_detector
from dreamreader.training.parts import ProbeTraining

if TYPE_CHECKING:
    from dreamreader.engine import Reader
    from dreamreader.training.fit import Told
    from dreamreader.training.prompted import Prompted
    from dreamreader.training.stored import Stored

_PROBES = "probes"  # folder


class ProbeSpec(Part):
    """Probes: activations of prompts (`subject`, `data`) or of a `store`, labels, training."""

    name: str = Field(min_length=1, max_length=80, description="Title; also names the folder.")
    subject: AnySubject | None = None
    data: Data | None = None
    store: str | None = Field(None, description="Folder of a harvest, instead of subject and data.")
    labels: Named = Field(
        description="A column, several, {attribute: column}, or {detector: attribute}."
    )
    sites: str | list[str] | None = Field(
        None, description="Site strings or globs; of a store all by default."
    )
    branch: str = "cond"
    steps: int | tuple[int, int] | None = Field(None, description="A step, or [start, stop].")
    tokens: int | list[int] | None = None
    seeds: AnySeeds = Field(
        default_factory=Seeds, description="Every prompt is run with every seed."
    )
    pipeline: CallArguments = Field(
        default_factory=dict, description="Arguments of the pipeline's call."
    )
    batch: Batch = Field(default_factory=Batch)
    probe: ProbeTraining = Field(default_factory=ProbeTraining)

    @field_validator("labels")
    @classmethod
    def _some(cls, value: Named) -> Named:
        if not value:
            raise ValueError("is empty")
        if from_detector(value):
            if isinstance(value, dict) and len(value) > 1:
                raise ValueError("detector stands alone: {detector: [color, background]}")
            try:
                check_detected(value)
            except DreamreaderError as error:
                raise ValueError(str(error)) from None
        elif isinstance(value, dict) and any(not isinstance(each, str) for each in value.values()):
            raise ValueError("each attribute has one column")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "ProbeSpec":
        run = ("subject", "data", "seeds", "pipeline", "batch")
        given = [name for name in run if name in self.model_fields_set]
        if self.store is None:
            missing = [name for name in ("subject", "data", "sites") if not getattr(self, name)]
            if missing:
                raise ValueError(f"{missing[0]} is missing; or give store, the folder of a harvest")
        elif given:
            raise ValueError(f"{given[0]} is of prompts that are run; a store has its own")
        elif from_detector(self.labels):
            raise ValueError("labels: a store has no pictures for the detector; give a column")
        elif self.probe.jitter:
            raise ValueError("probe.jitter: rows of a store are read as they are; leave it out")
        return self

    @property
    def seed_list(self) -> Sequence[int]:
        return listed_seeds(self.seeds)

    @property
    def chosen_steps(self) -> int | range | None:
        """As `Record` takes them."""
        return range(*self.steps) if isinstance(self.steps, tuple) else self.steps


class ProbeJob:
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

    def __init__(
        self,
        spec: ProbeSpec | Mapping[str, Any] | None = None,
        *,
        reader: "Reader | None" = None,
        home: Path | None = None,
        **fields: Any,
    ):
        self._reader, self._home = reader, home
        self.spec = spec_of(ProbeSpec, spec, fields, reader, "ProbeJob")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "ProbeJob":
        """Reads a spec file; see `specs.load.load_spec`."""
        return cls(load_spec(ProbeSpec, path, overrides), home=Path(path).parent)

    @cached_property
    def source(self) -> "Prompted | Stored":
        """Where rows and labels come from."""
        from dreamreader.training.prompted import Prompted
        from dreamreader.training.stored import Stored

        if self.spec.store is None:
            return Prompted(self.spec, self._reader)
        return Stored(self.spec, (self._home or Path()) / self.spec.store)

    def plan(self) -> str:
        """Sites, rows, labels and time, in lines."""
        return self.source.plan()

    def run(self, out: str | os.PathLike[str], *, told: "Told | None" = None) -> dict[str, Probe]:
        """Trains a probe at each site, and writes them with a report.

        Args:
            out: folder. A stopped training goes on after its last probe; a complete one is left as
                it is.
            told: called with (stage, done, total, loss).

        Returns:
            The probes by site.

        Raises:
            InvalidInput: the folder holds another training, is in use or cannot be written; or the
                labels do not fit, see `probes.fit`.
        """
        from dreamreader.training.probe_page import write_report

        folder, source = TrainingFolder(Path(out)), self.source
        files = {site: folder.path / probe_name(site) for site in source.sites}
        with folder.locked():
            batch = self._begun(folder)
            missing = [site for site in files if not _is_trained(folder, site)]
            for site, probe, notes in source.trained(missing, batch, told):
                own = {"run": folder.run, "card": probe.card.as_dict()}
                folder.write(notes_file(site), {**own, **notes})
                with explained(folder.path):
                    probe.save(files[site])
            if not folder.is_complete:
                names = [name for site in files for name in (probe_name(site), notes_file(site))]
                folder.complete({"sites": list(files)}, names)
            folder.check()
            if not (folder.path / "report.html").is_file():
                write_report(self.spec, folder)
            folder.tidy()
        return {site: Probe.load(file) for site, file in files.items()}

    def _begun(self, folder: TrainingFolder) -> int:
        """Rows of a call, as the folder has it from before; checks that it is of this job."""
        plan = folder.plan()
        batch = plan["batch"] if plan else self.source.batch()
        shown = self.spec.model_dump(
            mode="json", exclude={"name", "data", "store", "seeds", "batch"}
        )
        settings = {"spec": portable(shown), "batch": batch, **self.source.identity()}
        folder.begin(self.spec, self._fingerprint(settings), {"batch": batch})
        return batch

    def _fingerprint(self, settings: Mapping[str, Any]) -> Fingerprint:
        reader = self.source.reader
        if reader is not None:
            return fingerprint(reader.subject, settings, self.spec.seed_list, reader.tokenizer)
        from dreamreader.jobs.fingerprint import code_version, machine_facts, package_versions

        # rows of a store: the fingerprints of its harvests, in the settings, know the weights
        return Fingerprint(
            settings, "", {}, code_version(), package_versions(), [], machine_facts()
        )

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


def probe_name(site: str) -> str:
    """The file of a site's probe, within the folder."""
    return str(Path(_PROBES, file_of(site)))


def notes_file(site: str) -> str:
    """The file beside it, with its card and what was measured, within the folder."""
    return str(Path(probe_name(site)).with_suffix(".json"))
