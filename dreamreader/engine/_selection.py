"""Selections: one meaning for what users give as tokens, rows, heads, channels, steps or values.

`normalized` brings every accepted form to one of few; `mask_of` and `numbers_of` resolve it against
a number of entries.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput

Steps = int | slice | range | Iterable[int] | Callable[[int], bool] | None
_VALUES = ", slice, range, set or predicate"
Values = float | tuple[float, float] | slice | Iterable[float] | Callable[[float], bool] | None


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture as a token selection, in shares of width and height.

    Args:
        left, top, right, bottom: from 0 (left or top edge) to 1; a token is selected where its
            centre lies inside.
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self):
        for name, value in vars(self).items():
            _number(value, f"Box: {name}")
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise InvalidInput(
                f"{self}: needs 0 <= left < right <= 1 and 0 <= top < bottom <= 1 (shares of width "
                "and height)"
            )

    def mask(self, height: int, width: int) -> Tensor:
        """[height * width] bool."""
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        rows = (y >= self.top) & (y < self.bottom)
        columns = (x >= self.left) & (x < self.right)
        return (rows[:, None] & columns[None, :]).flatten()


def normalized(chosen: Any, label: str, *, soft: bool = False, words: bool = False) -> Any:
    """A selection by indices in one of the forms int, slice, range, list, set or mask tensor.

    Anything with `__index__` is an index, 0-d tensors and arrays are the number that they hold,
    lists, tuples, arrays and tensors are indices where they hold integers and masks where they hold
    truth values or, with `soft`, floating point strengths; arrays of strings are words, as lists.

    Args:
        soft: strengths from 0 to 1 are allowed, as for tokens.
        words: a word, several words or a `Box` are allowed, as for tokens.

    Returns:
        int | slice | range | list[int] | set[int] | Tensor (bool, or float with `soft`), and with
        `words` also str | tuple[str, ...] | Box.

    Raises:
        InvalidInput: the selection is none of these, or mixes them.

    Example:
        >>> normalized(np.array([0, 2]), "rows"), normalized(torch.tensor(1), "rows")
        ([0, 2], 1)
    """
    if isinstance(chosen, np.ndarray):
        chosen = _of_array(chosen)
    if words and isinstance(chosen, str):
        return _word(chosen, label)
    if chosen is None or (words and isinstance(chosen, Box)):
        return chosen
    if isinstance(chosen, slice):
        start, stop, step = (_check_bound(each, label) for each in _parts(chosen))
        if step == 0:
            raise InvalidInput(f"{label}: the step of a slice is not 0, got {chosen}")
        return slice(start, stop, step)
    if isinstance(chosen, range):
        return chosen
    if isinstance(chosen, Tensor):
        return _of_tensor(chosen, label, soft)
    if _is_index(chosen):
        return operator.index(chosen)
    if isinstance(chosen, str | bytes | Mapping) or not isinstance(chosen, Iterable):
        raise InvalidInput(f"{label}: {_kinds(soft, words)} is needed, got {chosen!r}")
    unordered = isinstance(chosen, set | frozenset)
    listed = [_scalar(each) for each in chosen]
    if words and listed and all(isinstance(each, str) for each in listed):
        return tuple(_word(each, label) for each in listed)
    if all(map(_is_index, listed)):
        found = [operator.index(each) for each in listed]
        return set(found) if unordered else _distinct(found, label)
    truths = [isinstance(each, bool) for each in listed]
    if all(truths) and not unordered:
        return torch.tensor(listed)
    numbers = [isinstance(each, float) for each in listed]
    if soft and all(numbers) and not unordered:
        return _of_tensor(torch.tensor(listed), label, soft)
    if any(truths) or any(numbers):
        raise InvalidInput(
            f"{label}: {chosen!r} could be indices or a mask; give whole numbers, or truth values "
            "alone" + (", or strengths from 0.0 to 1.0 alone" if soft else "")
        )
    raise InvalidInput(f"{label}: {_kinds(soft, words)} is needed, got {chosen!r}")


def mask_of(chosen: Any, count: int, label: str, noun: str = "") -> Tensor:
    """A normalized selection over `count` entries as [count] bool, or float where it is soft.

    Raises:
        InvalidInput: an index is out of range, or a mask is no [count].

    Example:
        >>> mask_of([0, -1], 3, "rows").tolist()
        [True, False, True]
    """
    if isinstance(chosen, Tensor):
        if chosen.dim() != 1:
            raise InvalidInput(f"{label}: a mask [{count}] is needed, got {list(chosen.shape)}")
        if chosen.numel() != count:
            raise InvalidInput(f"{label}: the mask has {chosen.numel()} values, there are {count}")
        return chosen.detach().cpu()
    mask = torch.zeros(count, dtype=torch.bool)
    if isinstance(chosen, slice):
        mask[list(range(*chosen.indices(count)))] = True
        return mask
    listed = [chosen] if isinstance(chosen, int) else chosen
    ends = (*listed[:1], *listed[-1:]) if isinstance(listed, range) else listed
    wrong = [each for each in ends if not -count <= each < count]
    if wrong:
        what, all_of = (f"{noun} {wrong[0]}", f"{count} {noun}s") if noun else (wrong[0], count)
        raise InvalidInput(f"{label}: {what} asked for, there are {all_of}")
    mask[[each % count for each in listed]] = True
    return mask


def describe(chosen: Any) -> str:
    """A selection in a few words."""
    return f"mask {list(chosen.shape)}" if isinstance(chosen, Tensor) else repr(chosen)


def numbers_of(chosen: Any, count: int, label: str) -> list[int]:
    """A normalized selection over `count` entries as indices, in the order in which they are given.

    Raises:
        InvalidInput: as `mask_of`; or a soft mask, or nothing is selected.
    """
    if isinstance(chosen, list | range):
        mask_of(chosen, count, label)
        kept = [each % count for each in chosen]
    else:
        kept = mask_of(chosen, count, label).nonzero().flatten().tolist()
    if not kept:
        raise InvalidInput(f"{label}: {describe(chosen)} selects none of {count}")
    return kept


def normalized_steps(chosen: Any, label: str) -> Any:
    """Like `normalized` for steps: a predicate is allowed too."""
    if callable(chosen):
        return chosen
    try:
        return normalized(chosen, label)
    except InvalidInput as error:
        raise InvalidInput(
            f"{label} must be a number, slice, range, set or predicate ({error})"
        ) from None


def normalized_values(chosen: Any, label: str) -> Any:
    """A selection by timestep, sigma or fraction: number, pair, slice, range, list, predicate.

    Raises:
        InvalidInput: it is none of these.
    """
    if chosen is None or callable(chosen) or isinstance(chosen, range):
        return chosen
    if isinstance(chosen, slice):
        bounds = [
            each if each is None else _number(each, label, _VALUES) for each in _parts(chosen)
        ]
        if bounds[2] is not None:
            raise InvalidInput(f"{label}: a slice of values has no step, got {chosen}")
        return slice(*bounds)
    if isinstance(chosen, Tensor | np.ndarray):
        chosen = chosen.tolist()
    if isinstance(chosen, tuple | list | set | frozenset):
        found = type(chosen)(_number(each, label, _VALUES) for each in chosen)
        if isinstance(found, tuple) and len(found) == 2 and found[0] > found[1]:
            raise InvalidInput(f"{label}: a pair is (low, high), got {found}")
        return found
    return _number(chosen, label, _VALUES)


def in_steps(chosen: Any, step: int, total: int | None) -> bool:
    """Whether a step index is in a selection; `total` resolves negative indices and open slices."""
    if chosen is None:
        return True
    if isinstance(chosen, Tensor):
        if total is None:
            raise InvalidInput("steps: a mask over the steps needs a known number of steps")
        return bool(mask_of(chosen, total, "steps")[step])
    if callable(chosen):
        return bool(chosen(step))
    if isinstance(chosen, slice):
        if total is None and any((each or 0) < 0 for each in (chosen.start, chosen.stop)):
            raise InvalidInput(f"steps={chosen}: negative indices need a known number of steps")
        return step in range(*chosen.indices(total if total is not None else step + 1))
    wanted = [chosen] if isinstance(chosen, int) else chosen
    if total is not None:
        return step in wanted or (step < total and step - total in wanted)
    ends = (*wanted[:1], *wanted[-1:]) if isinstance(wanted, range) else wanted
    if any(each < 0 for each in ends):
        raise InvalidInput(f"steps={chosen}: negative indices need a known number of steps")
    return step in wanted


def in_values(chosen: Any, value: float | None) -> bool:
    """Whether a timestep, sigma or fraction is in a selection."""
    if chosen is None:
        return True
    if value is None or math.isnan(value):
        return False
    if callable(chosen):
        return bool(chosen(value))
    if isinstance(chosen, slice):
        return (chosen.start is None or value >= chosen.start) and (
            chosen.stop is None or value < chosen.stop
        )
    if isinstance(chosen, tuple) and len(chosen) == 2:
        return chosen[0] <= value <= chosen[1]
    wanted = [chosen] if isinstance(chosen, int | float) else list(chosen)
    return any(math.isclose(value, each, rel_tol=1e-6, abs_tol=1e-9) for each in wanted)


def _of_tensor(chosen: Tensor, label: str, soft: bool) -> Any:
    if chosen.dtype == torch.bool:
        if chosen.dim() == 0:
            raise InvalidInput(f"{label}: one truth value selects nothing; give one for each entry")
        return chosen
    if chosen.is_floating_point():
        if chosen.shape == (0,):  # an empty list has no other dtype
            return []
        if not soft or chosen.dim() == 0:
            raise InvalidInput(f"{label}: whole numbers or truth values are needed, got {chosen}")
        if not bool(chosen.isfinite().all()):
            raise InvalidInput(f"{label}: a soft mask with values that are not finite")
        if not bool(((chosen >= 0) & (chosen <= 1)).all()):
            raise InvalidInput(
                f"{label}: a soft mask has strengths from 0 to 1, got {chosen.min():g} to "
                f"{chosen.max():g}; alpha or the direction scales them"
            )
        return chosen
    if chosen.is_complex():
        raise InvalidInput(f"{label}: whole numbers or truth values are needed, got {chosen.dtype}")
    if chosen.dtype == torch.uint8:
        raise InvalidInput(f"{label}: uint8 could be indices or a mask; use .long() or .bool()")
    if chosen.dim() > 1:
        raise InvalidInput(
            f"{label}: indices are one list of whole numbers, got {list(chosen.shape)}; a mask of "
            "the picture needs truth values (.bool())"
        )
    listed = chosen.tolist()
    return listed if isinstance(listed, int) else _distinct(listed, label)


def _distinct(indices: list[int], label: str) -> list[int]:
    """The indices, unless they look like a mask in whole numbers."""
    if len(indices) > 2 and set(indices) <= {0, 1}:
        raise InvalidInput(
            f"{label}: {indices} could be indices or a mask; give truth values, or every index once"
        )
    return indices


def _word(text: str, label: str) -> str:
    if not text.strip():
        raise InvalidInput(f"{label}: a word of the prompt is needed, got {text!r}")
    return text


def _of_array(chosen: np.ndarray) -> Any:
    """The same as a tensor; what no tensor holds, words among it, as Python values."""
    if chosen.dtype.kind not in "biufc":
        return chosen.tolist()
    try:
        return torch.from_numpy(np.ascontiguousarray(chosen).reshape(chosen.shape))
    except (TypeError, ValueError):  # a byte order or a width that torch does not have
        return chosen.tolist()


def _scalar(value: Any) -> Any:
    """A number of torch or numpy as the Python number that it holds."""
    if isinstance(value, np.generic) or (
        isinstance(value, Tensor | np.ndarray) and value.ndim == 0
    ):
        return value.item()
    return value


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)


def _check_bound(value: Any, label: str) -> int | None:
    value = _scalar(value)
    if value is None or _is_index(value):
        return value if value is None else operator.index(value)
    raise InvalidInput(f"{label}: a slice has whole numbers, got {value!r}")


def _number(value: Any, label: str, more: str = "") -> float:
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"{label} must be a number{more}, got {value!r}")
    if math.isnan(value):
        raise InvalidInput(f"{label}: nan is no number to select by")
    return value


def _parts(chosen: slice) -> tuple[Any, Any, Any]:
    return chosen.start, chosen.stop, chosen.step


def _kinds(soft: bool, words: bool) -> str:
    more = (", soft mask" if soft else "") + (", word, Box" if words else "")
    return f"an index, slice, range, list or set of indices, mask{more}"
