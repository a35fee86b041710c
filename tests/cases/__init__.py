"""Inputs of every operator, for tests and benchmarks: one file per operator.

`CASES` are all of a stem; `TESTED` says how every back end is tested with them (`_operator.py`),
and `OPERATORS` names what is registered, with an `Example` or more of each for modes and gradients.
"""

from importlib import import_module
from pathlib import Path

MODULES = {
    path.stem: import_module(f"{__name__}.{path.stem}")
    for path in sorted(Path(__file__).parent.glob("[!_]*.py"))
}
CASES = {name: module.CASES for name, module in MODULES.items()}
OPERATORS = {
    name: examples for module in MODULES.values() for name, examples in module.OPERATORS.items()
}
TESTED = {each.name: each for module in MODULES.values() for each in module.TESTED}
