"""Which class of diffusers a class stands for: one rule for all tables keyed by classes."""

import sys
from collections.abc import Mapping
from types import FunctionType
from typing import Any, TypeVar

Entry = TypeVar("Entry")


def entry_of(own: type, table: Mapping[str, Entry], method: str) -> Entry | None:
    """The entry for a class of diffusers, or for one that inherits `method` from it; else None.

    The table's keys are names of classes that diffusers defines; a class of that name from anywhere
    else is a stranger, and so are a subclass that does in `method` what it likes and a class whose
    `method` was replaced.
    """
    for base in own.__mro__:
        if base.__name__ in table and is_diffusers(base):
            return None if find_replacement(base, method) else table[base.__name__]
        if method in vars(base):
            return None
    return None


def author_of(own: type, method: str) -> type | None:
    """The class of diffusers whose `method` this class runs; None where it is anybody else's."""
    owner = next((base for base in own.__mro__ if method in vars(base)), None)
    if owner is None or not is_diffusers(owner) or find_replacement(owner, method):
        return None
    return owner


def is_diffusers(own: type) -> bool:
    """Whether this very class object is the one that a module of diffusers defines."""
    home = own.__module__
    if home.partition(".")[0] != "diffusers":
        return False
    return getattr(sys.modules.get(home), own.__name__, None) is own


def find_replacement(own: type, method: str) -> str | None:
    """What stands in the place of a method of diffusers; None where it is the method itself.

    Decorators of torch and diffusers belong to the method.
    """
    owner = next((base for base in own.__mro__ if method in vars(base)), None)
    if owner is None:
        return None
    function = vars(owner)[method]
    while True:
        if not isinstance(function, FunctionType):
            return f"a {type(function).__name__}"
        home = str(function.__globals__.get("__name__"))
        inner: Any = getattr(function, "__wrapped__", None)
        its_own = home == owner.__module__ and function.__code__.co_name == method
        if inner is None and its_own:
            return None
        if inner is None or home.partition(".")[0] not in ("torch", "diffusers"):
            return f"{function.__code__.co_name} of {home}"
        function = inner
