"""The CUDA sources without a GPU: they compile without local memory and link into one module.

One build of the module says it of all of them, with what an install has compiled already.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.slow,
]


def skip_without_tools() -> None:
    pytest.importorskip("pybind11")
    cmake = shutil.which("cmake", path=HERE)
    text = cmake and subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"(\d+)\.(\d+)", text or "")
    if not version or tuple(map(int, version.groups())) < (3, 26):
        pytest.skip("cmake 3.26 or later is not installed")
    if shutil.which("ninja", path=HERE) is None:
        pytest.skip("ninja is not installed")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module with machine code for CUDA; a kernel with local memory is an error."""
    skip_without_tools()
    folder = tmp_path_factory.mktemp("build")
    settings = {"DREAMREADER_EXT": "cuda", "DREAMREADER_SPILLS": "error", "PATH": HERE}
    environment = {**os.environ, **settings}
    environment.pop("DREAMREADER_CUDA_ARCHS", None)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return next(folder.rglob("_C*.so"))


def test_local_memory_is_an_error(module: Path, tmp_path: Path):
    """With the flags of the build: registers that spill, and an array that is no register."""
    rules = next(ROOT.glob(f"build/cmake-cuda-{sys.implementation.cache_tag}/build.ninja"))
    flags = re.search(r"FLAGS = (.*-Xptxas=\S+.*)", rules.read_text())
    assert flags
    source = tmp_path / "kernel.cu"
    loop = "for (int i = 0; i < n; i++) a[p[i] & 63] += x[i];"
    for size, told in ((64, "Local memory used"), (0, "")):
        array = f"float a[{size}] = {{}}; {loop} x[n] = a[p[n] & 63];" if size else "x[n] = 1;"
        source.write_text(f"__global__ void k(float* x, const int* p, int n) {{ {array} }}")
        command = f"nvcc {flags[1]} -c {source} -o {tmp_path / 'kernel.o'}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.returncode != 0) == bool(told) and told in done.stdout + done.stderr


def test_the_module_imports_without_a_driver(module: Path, tmp_path: Path):
    code = (
        "import _C; print(_C.build_info()); "
        "ops = ('intervene', 'attention_words', 'pack', 'low_rank', 'low_rank_backward'); "
        "assert all(hasattr(_C, f'{op}_cuda') for op in ops)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(module.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "sm_80" in done.stdout and "sm_90a" in done.stdout
    linked = subprocess.run(["ldd", str(module)], capture_output=True, text=True).stdout
    assert "libcudart" not in linked and "libcuda.so" not in linked
