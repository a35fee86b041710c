"""What a harvest does when the disk is full, and that its memory does not grow with the job."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dreamreader.store import Store
from dreamreader.store.verify import verify

from .jobs import content, texts

_FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from harvest import jobs

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
harvest = jobs.texts(data={"prompts": ["b", "a", "quite a long text " * 6, "c"]}, store={"unit": 1})
harvest.job
resource.setrlimit(resource.RLIMIT_FSIZE, (13_000, resource.RLIM_INFINITY))
try:
    harvest.run(sys.argv[1])
except InvalidInput as error:
    print(error)
    raise SystemExit(3)
"""
_TESTS = str(Path(__file__).parents[1])


def process(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_file_that_grows_too_large_leaves_whole_units_and_goes_on(tmp_path: Path) -> None:
    data = {"prompts": ["b", "a", "quite a long text " * 6, "c"]}
    done = process(_FULL, tmp_path / "s", _TESTS)
    assert done.returncode == 3, done.stderr
    assert (
        "s: a file would exceed the size limit; what was finished is kept. Make room and run"
        in (done.stdout)
    )
    store = Store(tmp_path / "s")
    assert store.units == [0, 1] and not store.manifest.complete
    assert verify(tmp_path / "s").holds
    assert not list(tmp_path.rglob("*.part"))
    texts(data=data, store={"unit": 1}).run(tmp_path / "s")
    texts(data=data, store={"unit": 1}).run(tmp_path / "whole")
    assert content(tmp_path / "s") == content(tmp_path / "whole")


_LONG = """
import sys
sys.path.insert(0, sys.argv[2])
from harvest import jobs
from pathlib import Path

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

folder = Path(sys.argv[1])
peaks = []
for times in (10, 100):
    file = folder / f"{times}.txt"
    file.write_text("".join(f"text number {n:05d} of some\\n" for n in range(8 * times)))
    capture = [{"sites": "transformer.h.*", "tokens": {"random": 0.5}}]
    harvest = jobs.texts(
        data={"file": str(file)}, capture=capture, batch={"rows": 8},
        store={"unit": 40, "ring_mb": 4},
    )
    harvest.run(folder / str(times))
    peaks.append(peak())
print(*peaks)
"""


def test_memory_does_not_grow_with_the_job(tmp_path: Path) -> None:
    done = process(_LONG, tmp_path, _TESTS)
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    assert Store(tmp_path / "100").rows == 10 * Store(tmp_path / "10").rows > 10_000
    assert long <= 1.05 * short
