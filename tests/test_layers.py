"""Imports point downwards only, and the package itself imports torch and nothing heavier."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "diffusers",
    "transformers",
    "accelerate",
    "matplotlib",
    "pyarrow",
    "pydantic",
    "typer",
    "jinja2",
)


def test_every_import_points_downwards():
    linter = pytest.importorskip("importlinter.cli")
    assert linter.lint_imports(str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_import_of_the_package_loads_torch_and_nothing_heavier():
    script = f"import sys, dreamreader; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
