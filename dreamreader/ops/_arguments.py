"""Checks that arguments of operators have the types that they must have."""

from collections.abc import Sequence
from reprlib import repr as shorten
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput

_MOST = 2**63 - 1  # of an integer of an operator


def describe(value: Any) -> str:
    """A value for an error: dtype and shape of a tensor, else the value and its type."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_nested:  # which has no shape
            return f"{kind}, nested"
        layout = "" if is_dense(value) else f", {str(value.layout).removeprefix('torch.')}"
        return f"{kind} {list(value.shape)}{layout}"
    if value is None or isinstance(value, torch.dtype):
        return str(value)
    return f"{' '.join(shorten(value).split())} ({type(value).__name__})"


def refuse(call: str, name: str, wanted: str, value: Any) -> NoReturn:
    """Raises InvalidInput that says what was wanted and what came."""
    raise InvalidInput(f"{call}: {name} must be {wanted}, got {describe(value)}")


def check_tensor(call: str, name: str, value: Any, wanted: str = "a tensor") -> None:
    """Raises InvalidInput unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        refuse(call, name, wanted, value)
    if not is_dense(value):
        refuse(call, name, "dense, as x.to_dense() gives it", value)


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has an entry in memory for each of its places."""
    return x.layout is torch.strided and not x.is_nested


def check_count(call: str, name: str, value: Any) -> None:
    """Raises InvalidInput unless `value` is a whole number from 0 to 2^63 - 1; True is none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer | torch.SymInt):
        refuse(call, name, "a whole number, 0 or more", value)
    if value < 0:
        raise InvalidInput(f"{call}: {name} must be 0 or more, got {value}")
    if not isinstance(value, torch.SymInt) and value > _MOST:
        raise InvalidInput(f"{call}: {name} must be below 2^63, got {value}")


def check_choice(call: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises InvalidInput unless `value` is one of the choices."""
    if not isinstance(value, str):
        refuse(call, name, f"one of {', '.join(choices)}", value)
    if value not in choices:
        raise InvalidInput(f"{call}: {name} must be one of {', '.join(choices)}, got {value}")
