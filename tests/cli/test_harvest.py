"""The real command `dreamreader harvest`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dreamreader.cli import app
from dreamreader.store import Store

SPEC = """\
name: the middle
subject: shapes-unet
data:
  prompts: [a red circle, a blue square]
pipeline: {num_inference_steps: 2}
capture:
  - sites: unet.mid_block
    dtype: float32
batch: {rows: 1}
store: {unit: 1}
"""


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["harvest", *map(str, arguments)])


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(SPEC)
    return path


def test_a_harvest_with_a_limit_and_then_to_its_end(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    found = run(spec, "-o", out, "--limit-gb", "0.00002")
    assert found.exit_code == 0, found.output
    assert "2 samples in 2 units of 1" in found.stderr and "rows/s" in found.stderr
    lines = found.stdout.splitlines()
    assert lines[0] == "the middle: 16 rows of 1 sites, 0.000 GB in 1 of 2 units"
    assert lines[1] == "not complete; the same command, with a larger limit if any, goes on"
    found = run(spec, "-o", out)
    assert "2 samples (1 are there) in 2 units of 1" in found.stderr
    assert found.stdout.splitlines() == [
        "the middle: 32 rows of 1 sites, 0.000 GB in 2 of 2 units",
        f"store: {out}",
    ]
    assert Store(out).manifest.complete


def test_a_dry_run_writes_nothing(spec: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(spec, "seeds.count=3", "--dry-run")
    assert found.exit_code == 0, found.output
    shown = found.stdout.splitlines()
    assert shown[0] == "the middle: harvest"
    assert [line.split()[0] for line in shown[1:]] == [
        *("samples", "units", "sites", "1", "rows", "disk", "time"),
    ]
    assert "rows      about 96" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("capture.0.dtype=int7", "-o", "s"), "override 'capture.0.dtype=int7': capture.0.dtype: "),
        (("capture.0.sites=unet.midblock", "-o", "s"), "error: unknown site 'unet.midblock'; near"),
    ],
    ids=str,
)
def test_what_is_said_about_mistakes(spec: Path, tmp_path, monkeypatch, arguments, text) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(spec, *arguments)
    assert found.exit_code == 2 and text in found.stderr


def test_ctrl_c_stops_between_two_units_and_the_command_goes_on(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    command = [
        sys.executable,
        "-m",
        "dreamreader",
        "harvest",
        str(spec),
        "seeds.count=100",
        "-o",
        str(out),
    ]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # whoever starts these tests in the background ignores the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (out / "shards" / "000002").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 130 and "stopped; no file was left half-written" in said
    assert "the same command goes on after the last unit that is whole" in said
    assert not list(out.rglob("*.part"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert not manifest["complete"] and manifest["jobs"][0]["units"] == [0, 200]
    store = Store(out)
    assert 3 <= len(store.units) < 200 and store.index.num_rows == 4 * len(store.units)
