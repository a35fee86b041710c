"""Jobs of every kind that are killed go on where they were, and end as if never stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dreamreader.store import Store
from dreamreader.store.verify import verify
from tests.jobs import killed

pytestmark = pytest.mark.slow


Stopped = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Stopped:
    """Folders of jobs that were killed at many moments, and what happened to them."""
    folder = tmp_path_factory.mktemp("killed")
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", killed.__file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "log.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a job but its lock and the table that is written from the others."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    left_out = (".lock", "index.parquet")
    return {name: file.read_bytes() for name, file in files.items() if name not in left_out}


@pytest.mark.parametrize("kind", killed.KINDS)
def test_a_job_that_is_killed_again_and_again_ends_bit_for_bit_the_same(stopped: Stopped, kind):
    folder, log = stopped
    kills = killed.KILLS.get(kind) or len(killed.MOMENTS[kind])
    assert [each["ended"] for each in log[kind]["killed"]] == [signal.SIGKILL] * kills
    whole = content(folder / kind)
    assert len(whole) >= 6
    for number, last in enumerate(log[kind]["last"]):
        assert last["ended"] == 0
        found = content(folder / f"{kind}-{number}")
        assert found.keys() == whole.keys()
        assert [name for name in found if found[name] != whole[name]] == []


@pytest.mark.parametrize("kind", killed.KINDS)
def test_finished_units_are_never_computed_again(stopped: Stopped, kind):
    folder, log = stopped
    counts = []
    for each in [*log[kind]["killed"], *log[kind]["last"]]:
        if not each["complete"]:  # then the files of batches go
            assert each["before"].items() <= each["after"].items()
            counts.append((len(each["before"]), len(each["after"])))
    if kind in killed.METHODS:
        plan = json.loads((folder / kind / "plan.json").read_text())["units"]
        assert len(plan) in {after for _, after in counts}
        assert 2 * len(plan) <= log[kind]["whole"]["calls"]
        assert not (folder / f"{kind}-0" / "rows").exists()
    if killed.UNITS.get(kind) != "none":
        assert any(0 < before < after for before, after in counts)
    if kind in killed.KILLS:
        assert any(0 < before == after for before, after in counts)
    else:  # the rest needed nothing of the model
        assert log[kind]["whole"]["calls"] > 0
        assert log[kind]["last"][0]["calls"] == log[kind]["again"]["calls"] == 0


def test_leftover_temporary_files_do_no_harm(stopped: Stopped):
    folder, log = stopped
    assert log["patch"]["parts"] >= 1 and log["steer"]["parts"] >= 1
    assert not list(folder.rglob("*.part"))
    assert not (folder / "reft-0" / "checkpoint").exists()


@pytest.mark.parametrize("kind", list(killed.METHODS))
def test_rows_of_an_experiment(stopped: Stopped, kind):
    folder, _ = stopped
    rows = [parquet.read_table(folder / each / "rows.parquet") for each in (kind, f"{kind}-0")]
    assert rows[0].num_rows > 10 and rows[0].equals(rows[1], check_metadata=True)
    assert len([name for name in content(folder / kind) if "artifacts" in name]) > rows[0].num_rows


def test_steps_of_a_checkpoint_are_not_taken_again(stopped: Stopped):
    """Every step leaves one: the third process is killed while it writes that of its third step."""
    _, log = stopped
    assert [each.get("first") for each in log["reft"]["killed"]] == [
        *(None, 1, 2),  # killed before a step, at the first, in the checkpoint of the fourth
        *(4, 12),
        *(None, None),
    ]


def test_a_probe_that_is_there_is_not_trained_again(stopped: Stopped):
    _, log = stopped
    assert [len(each["after"]) for each in log["probes"]["killed"]] == [0, 0, 1, 2]


@pytest.mark.parametrize("kind", list(killed.KILLS))
def test_every_row_of_a_store_is_there_exactly_once(stopped: Stopped, kind):
    folder, log = stopped
    store = Store(folder / kind)
    names = ["id", "seed", "step", "branch", "token"]
    for site in store.sites:
        keys = store.read(site).keys.select(names).to_pylist()
        assert len({tuple(each.values()) for each in keys}) == len(keys) > 0
    prompts = pa.concat_tables(store.samples(unit).select(["id", "seed"]) for unit in store.units)
    assert prompts.num_rows == {"texts": 20, "pictures": 6}[kind]
    assert verify(store.path).holds
    for number in range(len(log[kind]["last"])):
        other = Store(folder / f"{kind}-{number}")
        assert str(other.index.to_pylist()) == str(store.index.to_pylist())  # so NaN equals NaN
