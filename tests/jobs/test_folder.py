"""The folder of a job before anything was computed in it, and the job that it is of."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dreamreader.errors import InvalidInput
from dreamreader.jobs.fingerprint import fingerprint_of_rows
from dreamreader.training import ReftJob
from dreamreader.training.folder import TrainingFolder
from tests.training.jobs import REFT


class OtherSpec(BaseModel):
    """What another release may have written."""

    name: str = "a frame"
    turns: int = 3


def begun(path: Path, spec: BaseModel, **settings: Any) -> TrainingFolder:
    folder = TrainingFolder(path)
    path.mkdir(exist_ok=True)
    folder.begin(spec, fingerprint_of_rows(settings), {"units": 1})
    return folder


def test_the_job_of_a_folder_is_the_one_that_was_begun(tmp_path: Path) -> None:
    spec = ReftJob(**REFT).spec
    begun(tmp_path / "one", spec)
    assert ReftJob.of_folder(tmp_path / "one").spec == spec


def test_a_spec_that_is_no_longer_one_is_named_by_its_folder(tmp_path: Path) -> None:
    begun(tmp_path / "one", OtherSpec())
    with pytest.raises(InvalidInput) as error:
        ReftJob.of_folder(tmp_path / "one")
    assert str(error.value).startswith(f"{tmp_path / 'one'}") and "turns" in str(error.value)
