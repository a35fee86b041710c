"""The folder of a job: what was asked for, what the result depends on, and what is there of it.

    spec.yaml         what was asked for, with all defaults
    fingerprint.json  what the numbers depend on; written when the folder is begun
    plan.json         how the work is cut; a job that goes on keeps it

A file appears whole or not at all, and carries its own checksum. What is computed carries the
digest of the job that it is of.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dreamreader._checked import check, comment, read_json, write_json, write_text
from dreamreader._files import explain_disk_errors, lock_folder
from dreamreader.errors import InvalidInput
from dreamreader.jobs.differences import Difference, differences, first_difference
from dreamreader.jobs.fingerprint import Fingerprint

FINGERPRINT, PLAN, SPEC = "fingerprint.json", "plan.json", "spec.yaml"
MANIFEST = "manifest.json"  # of a store, in place of a fingerprint
IDENTITIES = (FINGERPRINT, MANIFEST)
_RUN = "# of the run "
_SAID = "what was run, for you to read; change a copy"


class JobFolder:
    """Reads and writes the folder of one job.

    Args:
        path: of the folder; made at the first write.
    """

    noun = "run"  # what is in it, for messages
    identity = FINGERPRINT  # the file that says of what it is

    def __init__(self, path: Path):
        self.path = Path(path)

    @property
    def is_begun(self) -> bool:
        """Whether a job was started here."""
        return (self.path / self.identity).is_file()

    @property
    def is_complete(self) -> bool:
        """Whether all of its result is here."""
        raise NotImplementedError

    @property
    def has_results(self) -> bool:
        """Whether something was computed here."""
        raise NotImplementedError

    @cached_property
    def run(self) -> str:
        """Digest of the fingerprint.

        Raises:
            InvalidInput: no job was begun here.
        """
        return self.need_fingerprint()["digest"]

    def fingerprint(self) -> dict[str, Any] | None:
        """What the result depends on; None where no job was begun."""
        return self.read(FINGERPRINT)

    def need_fingerprint(self) -> dict[str, Any]:
        """What the result depends on.

        Raises:
            InvalidInput: no job was begun here.
        """
        taken = self.fingerprint()
        if taken is None:
            raise InvalidInput(f"{self.path} has no {self.identity} that says what it is of")
        return taken

    def label(self) -> str:
        """The start of the fingerprint's digest, for people."""
        return self.run[:12]

    def need_complete(self) -> None:
        """Raises InvalidInput unless all of the result is here."""
        if not self.is_complete:
            what = "is not complete: run it again to go on" if self.is_begun else "is no run folder"
            raise InvalidInput(f"{self.path} {what}")

    def check(self) -> None:
        """Compares the files of a complete job with their checksums, where these stand apart."""

    def state(self) -> str:
        """In a word, how much of the result is here."""
        return "complete" if self.is_complete else "stopped"

    def differs(self, other: "JobFolder") -> dict[str, list[Difference]]:
        """Where two folders differ in spec, fingerprint and machine."""
        parts = ("weights", "subject", "code", "packages", "seeds")
        taken = [each.need_fingerprint() for each in (self, other)]
        hashed = [{name: each.get(name) for name in parts} for each in taken]
        return {
            "spec": list(differences(self.spec(), other.spec())),
            "fingerprint": list(differences(hashed[0], hashed[1])),
            "machine": list(differences(taken[0].get("machine"), taken[1].get("machine"))),
        }

    def lock(self) -> AbstractContextManager[None]:
        """Keeps a second process out; see `lock_folder`."""
        return lock_folder(self.path)

    def check_kind(self, kind: str) -> None:
        """Refuses a folder of another kind of job.

        Raises:
            InvalidInput: it holds one; says of which kind.
        """
        taken = self.read(FINGERPRINT)
        had = None if taken is None else taken.get("settings", {}).get("spec", {}).get("kind")
        if (self.path / MANIFEST).is_file():
            had = "harvest"
        if had not in (None, kind):
            raise InvalidInput(
                f"{self.path} holds a job of the kind {had}, and this one is of the kind {kind}. "
                "Give another folder, or delete this one"
            )

    def begin(self, spec: BaseModel, taken: Fingerprint, plan: Mapping[str, Any]) -> None:
        """Says what the folder is of, or checks that it is of the same.

        Args:
            spec: as it is shown; written anew where it is missing or was changed.
            taken: what the numbers depend on. plan: of a job that begins.

        Raises:
            InvalidInput: the folder is of another job, or of something else.
        """
        earlier = self.fingerprint()
        if earlier is not None and earlier["digest"] != taken.digest:
            raise InvalidInput(
                f"{self.path} holds another {self.noun}: "
                f"{first_difference(earlier, taken.as_dict())}. Give another folder, or delete "
                "this one"
            )
        if earlier is None and self.has_results:
            raise InvalidInput(
                f"{self.path} has files, but no {self.identity} that says of what; give another "
                "folder"
            )
        self._enter(spec, taken, plan if earlier is None else None)

    def _enter(self, spec: BaseModel, taken: Fingerprint, plan: Mapping[str, Any] | None) -> None:
        """Writes what the folder is of; without a plan only what is missing of that."""
        if plan is not None:
            self.write(PLAN, plan)
        if plan is not None or not self._has_spec(taken.digest):
            self._write_spec(spec, taken.digest)
        if plan is not None:
            self.write(FINGERPRINT, taken.as_dict())

    def plan(self) -> dict[str, Any] | None:
        """How the work was cut; None where no job was begun."""
        return self.read(PLAN) if self.is_begun else None

    def spec(self) -> Any:
        """The content of spec.yaml.

        Raises:
            InvalidInput: it is missing, was changed, or is of another job.
        """
        if not self._has_spec(self.run):
            raise InvalidInput(
                f"{self.path / SPEC} is missing or was changed; run the same command again, which "
                "writes it anew"
            )
        return yaml.safe_load((self.path / SPEC).read_text())

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file, None where it does not exist.

        Raises:
            InvalidInput: it is damaged.
        """
        try:
            return read_json(self.path / name, "start in another folder")
        except FileNotFoundError:
            return None

    def need(self, name: str) -> dict[str, Any]:
        """The content of a JSON file that has to be there.

        Raises:
            InvalidInput: it is missing or damaged.
        """
        found = self.read(name)
        if found is None:
            raise InvalidInput(f"{self.path / name} is missing; start in another folder")
        return found

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file."""
        with explain_disk_errors(self.path):
            write_json(self.path / name, content)

    def tidy(self) -> None:
        """Takes away what writes that were stopped have left."""
        with explain_disk_errors(self.path):
            for part in self.path.rglob(".*.part"):
                part.unlink(missing_ok=True)

    def _write_spec(self, spec: BaseModel, run: str) -> None:
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(self.path / SPEC, f"{comment(_SAID)}{_RUN}{run}\n{text}")

    def _has_spec(self, run: str) -> bool:
        """Whether spec.yaml is what a job wrote here."""
        file = self.path / SPEC
        try:
            check(file)
        except (FileNotFoundError, InvalidInput):
            return False
        return file.read_text().splitlines()[1] == f"{_RUN}{run}"
