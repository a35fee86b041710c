"""What gets built and shipped, and what happens without the native module."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHIPPED = (
    "csrc/CMakeLists.txt",
    "csrc/bind.h",
    "csrc/dlpack.h",
    "csrc/intervention.h",
    "csrc/intervention.cpp",
    "csrc/intervention_simd.cpp",
    "csrc/simd.h",
    "csrc/tensor_view.h",
    "dreamreader/py.typed",
    "pyproject.toml",
    "setup.py",
)


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without build outputs."""
    copy = tmp_path_factory.mktemp("checkout") / "dreamreader"
    skip = shutil.ignore_patterns(
        ".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


def test_source_distribution_is_complete(checkout: Path, tmp_path: Path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = run(sys.executable, "-W", "ignore", "-c", code, cwd=checkout, DREAMREADER_EXT="off")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(SHIPPED) <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.is_file()}
    assert sources <= names
    weights = ROOT / "dreamreader" / "zoo" / "weights"
    assert {str(path.relative_to(ROOT)) for path in weights.rglob("*.safetensors")} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


ACTIVE = """
import json, torch
from dreamreader import _register
from dreamreader.ops import Instruction, Program, intervene
x = torch.ones(1, 1, 3)
y = intervene(x, Program([Instruction("scale", lo=2.0)], rows=1, tokens=1, width=3))
owner = _register.active["intervene"]["CPU"]
print(json.dumps({"backend": owner.backend, "reason": owner.reason, "y": y.tolist()}))
"""


def active(where: Path, **environment: str) -> subprocess.CompletedProcess:
    # -S leaves out the finder of an editable install, which would find the module of this checkout.
    path = os.pathsep.join([str(where), str(Path(torch.__file__).parents[1])])
    return run(sys.executable, "-S", "-c", ACTIVE, cwd=where, PYTHONPATH=path, **environment)


def test_missing_extension_means_references(checkout: Path):
    done = active(checkout)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["backend"] == "reference" and answer["y"] == [[[2.0, 2.0, 2.0]]]
    assert "native module is not installed" in answer["reason"]


def test_broken_extension_is_an_error(checkout: Path):
    module = checkout / "dreamreader" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.write_bytes(b"not a library")
    try:
        done = active(checkout)
    finally:
        module.unlink()
    assert done.returncode != 0
    assert "BrokenExtension: dreamreader._C is installed but does not load" in done.stderr


def test_narrowed_to_the_reference():
    done = run(sys.executable, "-c", ACTIVE, cwd=ROOT, DREAMREADER_BACKEND="reference")
    answer = json.loads(done.stdout)
    assert answer["backend"] == "reference" and "DREAMREADER_BACKEND=reference" in answer["reason"]


def test_unknown_backend_names_the_choices():
    done = run(sys.executable, "-c", ACTIVE, cwd=ROOT, DREAMREADER_BACKEND="fast")
    assert "DREAMREADER_BACKEND='fast': use one of reference, triton, native" in done.stderr


def plan(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-W", "ignore", "setup.py", "--version", cwd=checkout, **environment)


def test_no_compiler_in_auto_mode_is_said_and_is_no_error(checkout: Path, tmp_path: Path):
    done = plan(checkout, PATH=str(tmp_path), CXX="", CUDACXX="", DREAMREADER_EXT="auto")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found, so the native module is not built" in done.stdout


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("cpu", "DREAMREADER_EXT=cpu needs a C++ compiler"),
        ("cuda", "DREAMREADER_EXT=cuda needs a C++ compiler"),
        ("gpu", "DREAMREADER_EXT='gpu': use one of auto, off, cpu, cuda"),
    ],
)
def test_what_was_asked_for_and_cannot_be_built(
    checkout: Path, tmp_path: Path, choice: str, text: str
):
    done = plan(checkout, PATH=str(tmp_path), CXX="", CUDACXX="", DREAMREADER_EXT=choice)
    assert done.returncode != 0 and text in done.stderr


def test_import_loads_nothing_heavier_than_torch():
    heavy = ("diffusers", "transformers", "triton", "pydantic", "pyarrow", "matplotlib")
    code = f"import sys, dreamreader; print([m for m in {heavy} if m in sys.modules])"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
