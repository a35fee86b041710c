"""Imports point downwards only, and the package itself imports torch and nothing heavier."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def test_no_package_reaches_into_the_engine():
    package = ROOT / "dreamreader"
    outside = [each for each in package.rglob("*.py") if package / "engine" not in each.parents]
    found = []
    for path in outside:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [each.name for each in node.names] if isinstance(node, ast.ImportFrom) else []
            inside = module.startswith("dreamreader.engine.")
            private = module == "dreamreader.engine" and any(each[0] == "_" for each in names)
            if inside or private or _asks_a_reader_for_what_is_private(node):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")  # pyright: ignore
    assert len(outside) > 100 and not found, "import from dreamreader.engine alone"


def _asks_a_reader_for_what_is_private(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
        return False
    name = getattr(node.value, "attr", getattr(node.value, "id", ""))
    return name == "reader" and not node.attr.startswith("__")


def test_a_name_that_the_engine_exports_is_no_module_of_it():
    import dreamreader.engine

    public = [name for name in vars(dreamreader.engine) if not name.startswith("_")]
    assert not [
        name for name in public if isinstance(getattr(dreamreader.engine, name), ModuleType)
    ]
