"""Which class of diffusers a class stands for: one rule for all tables keyed by classes."""

import sys
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def entry_of(own: type, table: Mapping[str, Entry], method: str) -> Entry | None:
    """The entry for a class of diffusers, or for one that inherits `method` from it; else None.

    The table's keys are names of classes that diffusers defines; a class of that name from anywhere
    else is a stranger, and so is a subclass that does in `method` what it likes.
    """
    for base in own.__mro__:
        if base.__name__ in table and is_diffusers(base):
            return table[base.__name__]
        if method in vars(base):
            return None
    return None


def is_diffusers(own: type) -> bool:
    """Whether this very class object is the one that a module of diffusers defines."""
    home = own.__module__
    if home.partition(".")[0] != "diffusers":
        return False
    return getattr(sys.modules.get(home), own.__name__, None) is own
