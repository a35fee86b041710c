"""The folder of a harvest is a store: its manifest says of what it is, and how the work is cut."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from dreamreader._files import explain_disk_errors
from dreamreader.errors import InvalidInput
from dreamreader.jobs.fingerprint import Fingerprint
from dreamreader.jobs.folder import JobFolder
from dreamreader.store.index import sealed_units, write_index
from dreamreader.store.layout import unit_folder
from dreamreader.store.manifest import FILE, Job, Manifest
from dreamreader.store.unit import Unit, read_unit

TARGET = "target"  # folder of the store of a second subject


class HarvestFolder(JobFolder):
    """Reads and writes a store as the folder of one harvest."""

    noun, identity = "harvest", FILE

    @property
    def target(self) -> "HarvestFolder":
        """The store of a second subject, where the spec has one."""
        return HarvestFolder(self.path / TARGET)

    @property
    def stores(self) -> "list[HarvestFolder]":
        """This one, and the target's where it is there."""
        return [self, self.target] if self.target.is_begun else [self]

    @property
    def is_complete(self) -> bool:
        return self.is_begun and Manifest.read(self.path).complete

    @property
    def has_results(self) -> bool:
        return bool(sealed_units(self.path))

    @property
    def job(self) -> Job:
        """What the manifest says of the harvest.

        Raises:
            InvalidInput: the store was merged from several.
        """
        jobs = Manifest.read(self.path).jobs
        if len(jobs) != 1:
            raise InvalidInput(
                f"{self.path} holds {len(jobs)} harvests, so none of them goes on there; give "
                "another folder"
            )
        return jobs[0]

    def fingerprint(self) -> dict[str, Any] | None:
        return dict(self.job.fingerprint) if self.is_begun else None

    def label(self) -> str:
        return " + ".join(job.run[:12] for job in Manifest.read(self.path).jobs)

    def plan(self) -> dict[str, Any] | None:
        """Samples of a unit and of a batch."""
        return None if not self.is_begun else dict(self.job.fingerprint.get("settings", {}))

    def spec(self) -> Any:
        return dict(self.job.spec)

    def state(self) -> str:
        manifest = Manifest.read(self.path)
        if manifest.complete:
            return "complete"
        planned = sum(job.units[1] - job.units[0] for job in manifest.jobs)
        return f"stopped, {len(sealed_units(self.path)):,} of {planned:,} units"

    def _enter(self, spec: BaseModel, taken: Fingerprint, plan: Mapping[str, Any] | None) -> None:
        if plan is not None:
            content = spec.model_dump(mode="json")
            job = Job(taken.digest, (0, plan["units"]), content, taken.as_dict())
            Manifest((job,)).write(self.path)

    def sealed(self) -> set[int]:
        """Numbers of the units that every store has."""
        return set.intersection(*(set(sealed_units(each.path)) for each in self.stores))

    def size_of(self, number: int, units: int) -> int:
        """Bytes of a sealed unit in every store; refuses as `unit` does."""
        return sum(each.unit(number, units).bytes for each in self.stores)

    def unit(self, number: int, units: int) -> Unit:
        """A sealed unit of this job, under its own number.

        Raises:
            InvalidInput: it is damaged, or was copied here from another place.
        """
        folder, run = self.path / "shards" / unit_folder(number), self.run
        unit = read_unit(folder)
        if (unit.run, unit.number) != (run, number) or number >= units:
            whose = "this harvest" if unit.run == run else f"another harvest, {unit.run[:16]}"
            raise InvalidInput(
                f"{folder} is unit {unit.number} of {whose}; take it away, and run the same "
                "command again to go on"
            )
        return unit

    def complete(self) -> None:
        """Says that all units are there."""
        for each in reversed(self.stores):  # this one last: it says that the job is complete
            replace(Manifest.read(each.path), complete=True).write(each.path)

    def refresh(self) -> None:
        """Brings the index up to date."""
        for each in self.stores:
            write_index(each.path)

    def tidy(self) -> None:
        """Takes away what was not finished when an earlier run was killed."""
        for path in (self.path, self.path / TARGET):
            for part in (path / "shards").glob(".*.part"):
                shutil.rmtree(part, ignore_errors=True)  # a lost worker may still write, unseen
            with explain_disk_errors(path):
                for part in path.glob(".*.part"):
                    part.unlink(missing_ok=True)
