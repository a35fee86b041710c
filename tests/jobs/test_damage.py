"""Folders of jobs with one damage each: refused by name, or the result is the right one."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamreader import load
from dreamreader._progress import ProgressEvent
from dreamreader.errors import DreamreaderError
from dreamreader.experiments import Experiment
from dreamreader.training import ProbeJob, ReftJob, SaeJob
from tests.experiments.conftest import MIDDLE, PAIRS
from tests.training.jobs import PROBES, REFT, SAE

FIT = [{"source": f"a red {name}", "target": f"a blue {name}"} for name in ("star", "cross")]
Run = Callable[[Path], Any]


class Stop(Exception):
    """Raised in a callback, as Ctrl-C would be."""


def _stop(event: ProgressEvent) -> None:
    """Stops when the subject has been run, and before all is there."""
    if (event.stage, event.done) == ("training", 11) or event.stage == "probes":
        raise Stop
    if event.stage == "rows" and event.done:
        raise Stop


@pytest.fixture(scope="module")
def jobs() -> dict[str, tuple[Run, Run]]:
    """Runs and stopped runs of each kind of job, giving plain values that are equal or not."""
    reader = load("shapes-unet")
    steer = {
        "name": "x",
        "subject": "shapes-unet",
        "data": {"pairs": PAIRS},
        "pipeline": {"num_inference_steps": 2},
        "method": {
            **{"kind": "steer", "sites": MIDDLE, "branch": "cond", "strengths": [0.0, 1.0]},
            **{"fit": {"pairs": FIT}, "controls": ["shuffled_labels"]},
        },
        "metrics": ["pixel_distance"],
        "batch": {"rows": 4},
    }

    def experiment(out: Path, **changes: Any) -> Any:
        found = Experiment(reader=reader, **steer).run(out, **changes)
        return found.rows, found.spec, found.folder.firing()

    def reft(out: Path, **changes: Any) -> Any:
        found = ReftJob(reader=reader, **REFT).run(out, **changes)
        return [each.tolist() for each in found.parameters()]

    def probes(out: Path, **changes: Any) -> Any:
        found = ProbeJob(reader=reader, **{**PROBES, "sites": [MIDDLE]}).run(out, **changes)
        return [
            (site, probe.card, probe.mlps[0].weights[0].tolist()) for site, probe in found.items()
        ]

    def sae(out: Path, **changes: Any) -> Any:
        found = SaeJob(reader=reader, **SAE).run(out, **changes)
        return [
            (site, name, each.W_dec.tolist(), each.threshold_mean.item())
            for site, own in found.items()
            for name, each in own.items()
        ]

    return {
        "sae": (sae, lambda out: sae(out, progress=_stop)),
        "experiment": (experiment, lambda out: experiment(out, progress=_stop)),
        "reft": (reft, lambda out: reft(out, progress=_stop)),
        "probes": (probes, lambda out: probes(out, progress=_stop)),
    }


def _damage(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    kind = rng.choice(["flip", "flip", "flip", "cut", "more", "swap"])
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "more":
        data += bytes(rng.randrange(1, 99))
    else:  # two bytes change places
        other = rng.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    file.write_bytes(data)
    return f"{kind} of {file.name}"


def _silent(folder: Path, run: Run, expected: Any, count: int, out: Path) -> tuple[list[str], int]:
    """Damages after which the result is another one, and how many were refused."""
    names = [each.relative_to(folder) for each in sorted(folder.rglob("*")) if _is_read(each)]
    rng, silent, refused = random.Random(0), [], 0
    for number in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)
        what = _damage(out / names[number % len(names)], rng)
        try:
            found = run(out)
        except DreamreaderError as error:
            refused += 1
            assert str(out) in str(error), (what, error)
        else:
            if found != expected:
                silent.append(what)
    return silent, refused


def _is_read(file: Path) -> bool:
    return file.is_file() and file.suffix not in (".png", ".html") and file.name != ".lock"


@pytest.mark.parametrize("kind", ["experiment", "reft", "probes", "sae"])
def test_a_complete_folder(jobs, kind: str, tmp_path: Path) -> None:
    run, _ = jobs[kind]
    expected = run(tmp_path / "whole")
    assert run(tmp_path / "whole") == expected
    silent, refused = _silent(tmp_path / "whole", run, expected, 80, tmp_path / "damaged")
    assert not silent and refused >= 30


@pytest.mark.parametrize("kind", ["experiment", "reft", "probes", "sae"])
def test_a_folder_that_was_stopped(jobs, kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    run, stopped = jobs[kind]
    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        stopped(tmp_path / "half")
    silent, refused = _silent(tmp_path / "half", run, expected, 20, tmp_path / "damaged")
    assert not silent and refused
