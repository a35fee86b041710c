"""Checks that arguments of operators have the types that they must have."""

from collections.abc import Sequence
from reprlib import repr as shorten
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput


def describe(value: Any) -> str:
    """A value for an error: dtype and shape of a tensor, else the value and its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None or isinstance(value, torch.dtype):
        return str(value)
    return f"{' '.join(shorten(value).split())} ({type(value).__name__})"


def refuse(call: str, name: str, wanted: str, value: Any) -> NoReturn:
    """Raises InvalidInput that says what was wanted and what came."""
    raise InvalidInput(f"{call}: {name} must be {wanted}, got {describe(value)}")


def check_tensor(call: str, name: str, value: Any, wanted: str = "a tensor") -> None:
    """Raises InvalidInput unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        refuse(call, name, wanted, value)


def check_count(call: str, name: str, value: Any) -> None:
    """Raises InvalidInput unless `value` is a whole number, 0 or more; True is none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer | torch.SymInt):
        refuse(call, name, "a whole number, 0 or more", value)
    if value < 0:
        raise InvalidInput(f"{call}: {name} must be 0 or more, got {value}")


def check_choice(call: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises InvalidInput unless `value` is one of the choices."""
    if not isinstance(value, str):
        refuse(call, name, f"one of {', '.join(choices)}", value)
    if value not in choices:
        raise InvalidInput(f"{call}: {name} must be one of {', '.join(choices)}, got {value}")
