"""The CUDA sources without a GPU: they compile without spills and link into the native module.

One build of the module says it of all of them. Its C++ is not optimised, as nothing runs it here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [path.name for path in sorted(CSRC.rglob("*.cu"))]
pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.slow,
]


def recent_cmake() -> str:
    """The cmake beside this Python, else the one on the path, if it is recent enough."""
    for folder in (str(Path(sys.executable).parent), None):
        if found := shutil.which("cmake", path=folder):
            text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"(\d+)\.(\d+)", text)
            if version and tuple(map(int, version.groups())) >= (3, 26):
                return found
    pytest.skip("cmake 3.26 or later is not installed")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The native module with machine code for CUDA, and what the compilers said."""
    pytest.importorskip("pybind11")
    cmake, folder = recent_cmake(), tmp_path_factory.mktemp("build")
    where = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    settings = [
        "-DDREAMREADER_WITH_CUDA=ON",
        "-DDREAMREADER_CUDA_ARCHS=80-real;90a-real",  # PTX of 90 is compiled as 90a is
        f"-Dpybind11_DIR={where}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
        "-DCMAKE_CUDA_FLAGS_DEBUG=-O3 -DNDEBUG -Xptxas -v,-warn-spills --threads 2",
    ]
    said = ""
    for command in (
        [cmake, "-S", str(CSRC), "-B", str(folder), *settings],
        [cmake, "--build", str(folder), "-j", "2", "--verbose"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-4000:]
    return next(folder.rglob("_C*.so")), said


def test_no_kernel_spills(build: tuple[Path, str]):
    report = build[1]
    kernels = re.findall(r"Compiling entry function", report)
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill \w+, (\d+) bytes spill", report
    )
    assert len(spills) >= len(kernels) > 0
    assert set(spills) == {("0", "0", "0")}, [each for each in spills if each != ("0", "0", "0")]
    assert all(re.search(rf"{re.escape(name)}\.o", report) for name in SOURCES)


def test_the_module_imports_without_a_driver(build: tuple[Path, str], tmp_path: Path):
    module = build[0]
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
