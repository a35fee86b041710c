"""Trainings that are killed go on where they were, and end to the bit as if they had not been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import killed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Folders of trainings that were killed at many moments, and what happened to them."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", killed.__file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize("kind", list(killed.MOMENTS))
def test_a_training_that_is_killed_ends_bit_for_bit_the_same(stopped, kind: str):
    folder, log = stopped
    ended = [each["ended"] for each in log[kind]["killed"]]
    assert ended == [signal.SIGKILL] * len(killed.MOMENTS[kind])
    assert log[kind]["whole"]["ended"] == log[kind]["last"]["ended"] == 0
    whole, other = folder / kind, folder / f"{kind}-stopped"
    files = {
        path.relative_to(whole)
        for path in whole.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert len(files) >= 6
    for name in files:
        assert (whole / name).read_bytes() == (other / name).read_bytes(), name
    assert not (other / "checkpoint").exists() and not list(other.rglob("*.part"))


@pytest.mark.parametrize("kind", list(killed.MOMENTS))
def test_what_is_there_is_not_computed_again(stopped, kind: str):
    _, log = stopped
    assert int(log[kind]["whole"]["calls"]) > 0
    assert log[kind]["last"]["calls"] == log[kind]["again"]["calls"] == "0"


def test_steps_of_a_checkpoint_are_not_taken_again(stopped):
    """Every step leaves one: the third process is killed while it writes that of its third step."""
    _, log = stopped
    first = dict(zip(killed.MOMENTS["reft"], log["reft"]["killed"], strict=True))
    assert {moment: each["first"] for moment, each in first.items()} == {
        **{("fingerprint.json", 1): None, ("step", 1): 1, ("training.safetensors", 3): 2},
        **{("step", 11): 4, ("adapter.safetensors", 1): 12},
        **{("result.json", 1): None, ("report.html", 1): None},
    }


def test_a_probe_that_is_there_is_not_trained_again(stopped):
    _, log = stopped
    there: dict[str, int] = {}
    for each in log["probes"]["killed"]:
        assert there.items() <= each["files"].items()
        there = each["files"]
    counts = [len(each["files"]) for each in log["probes"]["killed"]]
    assert counts == [0, 0, 1, 2]
