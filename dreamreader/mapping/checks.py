"""Checks of what callers give: whole numbers, numbers and tensors."""

import math
import operator
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput


def check_whole(what: str, value: Any, least: int | None = None) -> int:
    """A whole number, of Python, NumPy or a tensor, as an int.

    Args:
        what: it is, for the error. least: the smallest that is taken.

    Raises:
        InvalidInput: it is no whole number, or below the least.
    """
    bound = "" if least is None else f" from {least}"
    try:
        if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise InvalidInput(f"{what} is a whole number{bound}, got {value!r}") from None
    if least is not None and found < least:
        raise InvalidInput(f"{what} is a whole number{bound}, got {value!r}")
    return found


def check_number(what: str, value: Any) -> float:
    """A finite number, of Python, NumPy or a tensor without dimensions, as a float.

    Raises:
        InvalidInput: it is none.
    """
    given = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(given, bool | np.bool_) or not isinstance(given, Real):
        raise InvalidInput(f"{what} is a number, got {value!r}")
    if not math.isfinite(given):
        raise InvalidInput(f"{what} is a finite number, got {value!r}")
    return float(given)


def check_rows(what: str, value: Any) -> Tensor:
    """Activations as a tensor that is part of no graph; of a NumPy array, in its memory.

    Raises:
        InvalidInput: it is neither, or not of floating point.
    """
    if isinstance(value, np.ndarray):
        value = as_tensor(what, value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        hint = "" if isinstance(value, Tensor) else "; torch.tensor(...) makes one of a list"
        raise InvalidInput(f"{what} must be floating point, a tensor or an array, got {kind}{hint}")
    return value.detach()


def as_tensor(what: str, value: Any) -> Tensor:
    """A tensor of a tensor, a list or a NumPy array.

    Raises:
        InvalidInput: it is none of numbers.
    """
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{what} must be numbers, got {type(value).__name__}: {error}") from None
