"""Inputs of every operator, for tests and benchmarks: one file per operator with its `CASES`."""

from importlib import import_module
from pathlib import Path

CASES = {
    path.stem: import_module(f"{__name__}.{path.stem}").CASES
    for path in sorted(Path(__file__).parent.glob("[!_]*.py"))
}
