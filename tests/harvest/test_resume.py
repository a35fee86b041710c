"""Harvests that are killed go on where they were, and end as if they had never been stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dreamreader.store import Store
from dreamreader.store.verify import verify

from . import killed
from .jobs import content

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Stores of harvests that were killed at 50 moments, and what happened to them."""
    folder = tmp_path_factory.mktemp("killed")
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, killed.__file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize("kind", list(killed.KILLS))
def test_a_harvest_that_is_killed_again_and_again_ends_byte_for_byte_the_same(stopped, kind):
    folder, log = stopped
    assert [each["ended"] for each in log[kind]["killed"]] == [signal.SIGKILL] * killed.KILLS[kind]
    whole = folder / kind
    for number, last in enumerate(log[kind]["last"]):
        assert last["ended"] == 0
        out = folder / f"{kind}-{number}"
        assert content(out) == content(whole)
        assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
        lines = [Store(each).index.to_pylist() for each in (out, whole)]
        assert str(lines[0]) == str(lines[1])  # as text NaN equals NaN
        assert not list(out.rglob("*.part"))
    assert verify(whole).holds


@pytest.mark.parametrize("kind", list(killed.KILLS))
def test_every_row_is_there_exactly_once(stopped, kind) -> None:
    folder, _ = stopped
    store = Store(folder / kind)
    names = ["id", "seed", "step", "branch", "token"]
    for site in store.sites:
        keys = store.read(site).keys.select(names).to_pylist()
        assert len({tuple(each.values()) for each in keys}) == len(keys) > 0
    prompts = pa.concat_tables(store.samples(unit).select(["id", "seed"]) for unit in store.units)
    assert prompts.num_rows == {"texts": 20, "pictures": 6}[kind]


@pytest.mark.parametrize("kind", list(killed.KILLS))
def test_sealed_units_are_never_made_again(stopped, kind) -> None:
    _, log = stopped
    counts = []
    for each in [*log[kind]["killed"], *log[kind]["last"]]:
        assert each["before"].items() <= each["after"].items()
        counts.append((len(each["before"]), len(each["after"])))
    assert any(0 < before < after for before, after in counts)
    assert any(0 < before == after for before, after in counts)
