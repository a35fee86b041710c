"""The folder of a training, beside what the folder of any job has:

result.json       written last: the training is complete; knows the files beside it
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreamreader._checked import damage_error
from dreamreader._files import explain_disk_errors, write_atomic
from dreamreader.errors import InvalidInput
from dreamreader.jobs.folder import PLAN, SPEC, JobFolder
from dreamreader.store.layout import file_of

RESULT = "result.json"
ADAPTER, HISTORY, CHECKPOINTS = "adapter.safetensors", "history.jsonl", "checkpoint"
_PROBES = "probes"  # folder


def probe_name(site: str) -> str:
    """The file of a site's probe, within the folder."""
    return str(Path(_PROBES, file_of(site)))


def notes_file(site: str) -> str:
    """The file beside it, with its card and what was measured, within the folder."""
    return str(Path(probe_name(site)).with_suffix(".json"))


class TrainingFolder(JobFolder):
    """Reads and writes one folder."""

    noun = "training"

    def numbers(self) -> dict[str, Any]:
        """The result, without its files and their hashes."""
        return {k: v for k, v in self.need(RESULT).items() if k not in ("files", "sha256")}

    @property
    def is_complete(self) -> bool:
        return (self.path / RESULT).is_file()

    @property
    def has_results(self) -> bool:
        return any(each.name not in (PLAN, SPEC) for each in self.path.glob("[!.]*"))

    def write_text(self, name: str, text: str) -> None:
        """Writes a text whose checksum `complete` notes."""
        with explain_disk_errors(self.path):
            write_atomic(self.path / name, text)

    def complete(self, result: Mapping[str, Any], files: Iterable[str]) -> None:
        """Writes the result, with the checksums of the files that belong to it."""
        sums = {name: self.checksum(name) for name in files}
        self.write(RESULT, {**result, "files": sums})

    def check(self) -> None:
        """Compares the files of a complete training with their checksums.

        Raises:
            InvalidInput: one is missing or damaged.
        """
        for name, said in self.need(RESULT)["files"].items():
            if not (self.path / name).is_file():
                raise InvalidInput(f"{self.path / name} is missing; {_HINT}")
            if self.checksum(name) != said:
                raise damage_error(self.path / name, "it is not the one of this training", _HINT)

    def checksum(self, name: str) -> str:
        """SHA-256 of a file."""
        with open(self.path / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def clear(self, name: str) -> None:
        """Takes away a folder that a complete training does not need."""
        shutil.rmtree(self.path / name, ignore_errors=True)


_HINT = "restore it, or train anew in another folder"
