"""The folder of a training: what was asked for, and what the numbers depend on.

    spec.yaml         what was asked for, with all defaults
    fingerprint.json  what the numbers depend on
    plan.json         rows of a call while activations are recorded
    result.json       written last: the training is complete

A file appears whole or not at all.
"""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dreamreader._files import explained, locked, write_atomic
from dreamreader.audit import Fingerprint
from dreamreader.audit.differences import first_difference
from dreamreader.errors import InvalidInput

RESULT = "result.json"


class TrainingFolder:
    """Reads and writes one folder.

    Args:
        path: made at the first write.
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    @property
    def is_complete(self) -> bool:
        return (self.path / RESULT).is_file()

    def locked(self) -> AbstractContextManager[None]:
        """Keeps a second process out."""
        return locked(self.path)

    def begin(self, spec: BaseModel, taken: Fingerprint) -> None:
        """Says what the folder is of, or checks that it is of the same.

        Args:
            spec: as it is shown. taken: what the numbers depend on.

        Raises:
            InvalidInput: the folder is of another training, or of something else.
        """
        earlier = self.read("fingerprint.json")
        if earlier is None:
            there = [each.name for each in self.path.glob("[!.]*") if each.name != "plan.json"]
            if sorted(there) not in ([], ["spec.yaml"]):
                raise InvalidInput(
                    f"{self.path} has files, but no fingerprint.json that says of what; give "
                    "another folder"
                )
            text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            self.write("spec.yaml", text)
            self.write("fingerprint.json", taken.as_dict())
        elif earlier["digest"] != taken.digest:
            raise InvalidInput(
                f"{self.path} holds another training: "
                f"{first_difference(earlier, taken.as_dict())}. Give another folder, or delete "
                "this one"
            )

    def tidy(self, *folders: str) -> None:
        """Takes away what a complete training does not need, and what stopped writes have left."""
        for name in folders:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for part in self.path.rglob(".*.part"):
            part.unlink()

    def read(self, name: str) -> Any:
        """The content of a JSON file, None where it does not exist.

        Raises:
            InvalidInput: it is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise InvalidInput(f"{file} is damaged ({error}); start in another folder") from error

    def write(self, name: str, content: Any) -> None:
        """Writes text as it is, anything else as JSON."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        with explained(self.path):
            write_atomic(self.path / name, text)
