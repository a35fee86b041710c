"""manifest.json: what was asked for, of which subject, and how much of it is there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dreamreader._checked import damage_error, read_json, write_json
from dreamreader._files import explain_disk_errors
from dreamreader._version import __version__
from dreamreader.errors import InvalidInput
from dreamreader.store.layout import FORMAT, check_format

FILE = "manifest.json"
KIND = "dreamreader.store"


@dataclass(frozen=True)
class Job:
    """One harvest.

    Attributes:
        run: digest of the fingerprint. units: first, and one after the last, that it plans.
        spec: what was asked for. fingerprint: what the rows depend on.
    """

    run: str
    units: tuple[int, int]
    spec: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """How many rows of a site, at a step, are meant."""

    site: str
    step: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        jobs: harvests it is from; several after a merge. complete: whether all their units are
            there. left_out: rows that were chosen but not written, for want of time.
        not_finite: rows that have an infinite value or NaN. written_by: version of dreamreader.
    """

    jobs: tuple[Job, ...] = ()
    complete: bool = False
    left_out: tuple[Count, ...] = ()
    not_finite: tuple[Count, ...] = ()
    written_by: str = __version__

    @property
    def planned(self) -> int:
        """One after the last unit that the jobs plan; 0 where nobody said."""
        return max((job.units[1] for job in self.jobs), default=0)

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether a folder has a manifest."""
        return (Path(folder) / FILE).is_file()

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """The manifest of a store.

        Raises:
            InvalidInput: there is none, it is damaged, or of a newer format.
        """
        file = Path(folder) / FILE
        try:
            content = read_json(file)
        except (FileNotFoundError, NotADirectoryError):
            raise InvalidInput(f"{folder} is no store: it has no {FILE}") from None
        check_format(file, content.get("format") if content.get("kind") == KIND else None)
        try:
            return _from(content)
        except (KeyError, TypeError, ValueError) as error:
            raise damage_error(file, repr(error)) from error

    def write(self, folder: Path) -> Path:
        """Writes it into a store, whole or not at all."""
        content = {
            "format": FORMAT,
            "kind": KIND,
            "written_by": self.written_by,
            "jobs": [asdict(job) for job in self.jobs],
            "complete": self.complete,
            "left_out": [asdict(each) for each in self.left_out],
            "not_finite": [asdict(each) for each in self.not_finite],
        }
        with explain_disk_errors(Path(folder)):
            return write_json(Path(folder) / FILE, content)


def _from(content: Mapping[str, Any]) -> Manifest:
    jobs = (
        Job(job["run"], (job["units"][0], job["units"][1]), job["spec"], job["fingerprint"])
        for job in content["jobs"]
    )
    return Manifest(
        tuple(jobs),
        content["complete"],
        tuple(Count(**each) for each in content["left_out"]),
        tuple(Count(**each) for each in content["not_finite"]),
        content["written_by"],
    )
