"""Runs that are stopped go on where they were, and end as if they had never been stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from . import killed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Folders of runs that were killed at many moments, and what happened to them."""
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


@pytest.mark.parametrize("kind", list(killed.METHODS))
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_the_same(stopped, kind) -> None:
    folder, log = stopped
    assert [each["ended"] for each in log[kind]["killed"]] == [signal.SIGKILL] * len(
        killed.MOMENTS[kind]
    )
    assert log[kind]["whole"]["ended"] == log[kind]["last"]["ended"] == 0
    whole, ended = folder / kind, folder / f"{kind}-stopped"
    one, other = (parquet.read_table(each / "rows.parquet") for each in (whole, ended))
    assert one.num_rows > 10 and one.equals(other, check_metadata=True)
    files = sorted(file.relative_to(whole) for file in whole.rglob("artifacts/**/*.*"))
    assert len(files) > one.num_rows
    for name in [*files, Path("firing.json"), Path("plan.json"), Path("spec.yaml")]:
        assert (whole / name).read_bytes() == (ended / name).read_bytes(), name
    digests = [json.loads((e / "fingerprint.json").read_text())["digest"] for e in (whole, ended)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", list(killed.METHODS))
def test_finished_batches_are_never_computed_again(stopped, kind) -> None:
    folder, log = stopped
    plan = json.loads((folder / kind / "plan.json").read_text())["units"]
    counts = []
    for each in log[kind]["killed"]:
        counts.append((len(each["before"]), len(each["after"])))
        if not each["complete"]:
            assert each["before"].items() <= each["after"].items()
    assert len(plan) in {after for _, after in counts}
    assert any(0 < before < after for before, after in counts)
    assert not (folder / f"{kind}-stopped" / "rows").exists()
    # the rest needed nothing of the model
    assert log[kind]["last"]["calls"] == log[kind]["again"]["calls"] == "0"
    assert 2 * len(plan) <= int(log[kind]["whole"]["calls"])


def test_leftover_temporary_files_do_no_harm(stopped) -> None:
    folder, log = stopped
    assert log["patch"]["parts"] >= 1 and log["steer"]["parts"] >= 3
    left = [file.name for file in folder.rglob("*.part")]
    assert all(name.startswith(".report.html") for name in left), left
