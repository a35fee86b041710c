"""Rows of a run: how prompts, seeds and per-row strengths are brought to one length."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy
from torch import Tensor

from dreamreader.engine._cache import RunRow
from dreamreader.engine._clock_run import own_class
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._families.per_row import PICTURES, has_several_networks, meaning
from dreamreader.errors import InvalidInput, check_text


@dataclass(frozen=True)
class RowPlan:
    """One prompt and one seed for each row."""

    prompts: tuple[Any, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rows(self) -> list[RunRow]:
        pairs = zip(self.prompts, self.seeds, strict=True)
        return [
            RunRow(n, str(p) if isinstance(p, str) else None, s) for n, (p, s) in enumerate(pairs)
        ]


def plan_rows(
    prompts: str | Sequence[str], seeds: int | Sequence[int] | None, edits: Sequence[EditRequest]
) -> RowPlan:
    """Broadcast prompts, seeds and the edits' per-row values to one number of rows.

    Each has length 1 or N. An int seed s gives prompt i the seed s + i; a single prompt keeps s
    over all its rows. Without seeds, a random one is drawn.

    Raises:
        InvalidInput: the prompts are empty or no strings, or lengths do not fit.

    Example:
        >>> plan_rows(["a", "b"], 3, []).seeds
        (3, 4)
        >>> plan_rows("a", [0, 1, 2], []).prompts
        ('a', 'a', 'a')
    """
    listed = [prompts] if isinstance(prompts, str) else _in_order(prompts, "prompts", "a prompt")
    if not listed:
        raise InvalidInput("prompts is empty: at least one prompt is needed")
    wrong = [each for each in listed if not isinstance(each, str)]
    if wrong:
        raise InvalidInput(f"prompts must be strings, got {type(wrong[0]).__name__} {wrong[0]!r}")
    for number, each in enumerate(listed):
        check_text(each, f"prompt {number}")
    lengths = {"prompts": len(listed)}
    if seeds is not None and not _is_number(seeds):
        seeds = list(seeds_of(seeds))
        lengths["seeds"] = len(seeds)
    for number, edit in enumerate(edits):
        for name, length in edit.row_lengths().items():
            lengths[f"{name} of edit {number} ({edit.label})"] = length
    count = max(lengths.values())
    if any(length not in (1, count) for length in lengths.values()):
        shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InvalidInput(f"rows do not fit: {shown}; each needs 1 or {count}")
    several = len(listed) > 1
    if seeds is None:
        seeds = int.from_bytes(os.urandom(4), "little")
    if not isinstance(seeds, list):
        first = _seed(seeds)
        seeds = [first + n if several else first for n in range(count)]
    full_prompts = tuple(listed if several else listed * count)
    return RowPlan(full_prompts, tuple(seeds if len(seeds) > 1 else list(seeds) * count))


def seeds_of(seeds: Any) -> tuple[int, ...]:
    """One seed for each row, of a list, range, array or tensor.

    Raises:
        InvalidInput: there are none, they have no order, or one is no seed.
    """
    found = tuple(_seed(each) for each in _in_order(seeds, "seeds", "an int"))
    if not found:
        raise InvalidInput("seeds is empty: give an int, or one seed for each row")
    return found


def _in_order(value: Any, name: str, kind: str) -> list[Any]:
    """What a list, tuple, array or generator holds; a set or dictionary has no order for rows."""
    unordered = isinstance(value, str | bytes | Mapping | Set)
    if unordered or not isinstance(value, Iterable) or not getattr(value, "shape", (1,)):
        raise InvalidInput(
            f"{name}: {kind} or a list with one for each row is needed, got {value!r}"
        )
    return list(value)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__index__") and not getattr(value, "shape", ())


def _seed(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InvalidInput(f"a seed is an int, got {value!r}")
    if not 0 <= number < 2**63:
        raise InvalidInput(f"a seed is between 0 and 2**63 - 1, got {number}")
    return number


def split(pipe: Any, arguments: Mapping[str, Any], start: int, stop: int, total: int) -> dict:
    """The share of rows start .. stop - 1 in the arguments of a pipeline's call.

    What has one entry for each row is cut, everything else goes to every batch. Lists are copied:
    some pipelines write into those they are given.

    Raises:
        InvalidInput: an argument could hold one entry for each row or one for all of them, and
            which is not known; or it has neither 1 entry nor one for each row.
    """
    whole = start == 0 and stop == total
    found = {}
    for name, value in arguments.items():
        if not whole and _belongs_to_rows(pipe, name, value, total):
            value = value[start:stop]
        found[name] = list(value) if isinstance(value, list) else value
    return found


def repeat_rows(pipe: Any, arguments: Mapping[str, Any], total: int) -> dict[str, Any]:
    """Arguments with one entry for each row, also where one was given for all of them.

    Raises:
        InvalidInput: latents or embeddings have neither 1 entry nor one for each row.
    """
    found = dict(arguments)
    for name, value in arguments.items():
        entries = _entries(value)
        if entries is None or not _is_per_row(pipe, name, value):
            continue
        if entries not in (1, total) and name not in PICTURES:  # of which pipelines repeat several
            raise InvalidInput(f"{name}: has {entries} entries, the run has {total} rows")
        if entries == 1 < total:
            if isinstance(value, list | tuple):
                found[name] = list(value) * total
            elif isinstance(value, Tensor):
                found[name] = value.expand(total, *value.shape[1:]).clone()
            elif isinstance(value, numpy.ndarray):
                found[name] = value.repeat(total, axis=0)
    return found


def _is_per_row(pipe: Any, name: str, value: Any) -> bool | None:
    """Whether an argument has one entry for each row, or one for all; None: not known."""
    per_row = meaning(own_class(pipe), name)
    if not per_row:
        return per_row
    depth = 5 if "video" in name else 4  # dimensions of a batch of pictures, of videos
    if name in PICTURES:
        if _is_one(name, value, depth):
            return False
        if has_several_networks(pipe) or _is_ambiguous(value, depth):
            return None
    return True


def _belongs_to_rows(pipe: Any, name: str, value: Any, total: int) -> bool:
    entries, per_row = _entries(value), _is_per_row(pipe, name, value)
    if per_row is False or entries is None:
        return False
    if per_row is None:
        if not _may_hold_rows(value, total):
            return False
        own = own_class(pipe).__name__
        raise InvalidInput(
            f"{name}: has length {entries} in a run of {total} rows, and whether {own} takes one "
            "for each row or all of them for every row is not known, so it cannot be split over "
            "batches; leave batch_size out, or run one row at a time with its own"
        )
    if entries not in (1, total):
        raise InvalidInput(f"{name}: has {entries} entries, the run has {total} rows")
    return entries == total


def _entries(value: Any) -> int | None:
    """Length of a list, tuple, dictionary, tensor or array; None of what can hold no rows."""
    if isinstance(value, list | tuple | Mapping):
        return len(value)
    shape = getattr(value, "shape", None)
    return int(shape[0]) if shape is not None and len(shape) else None


def _may_hold_rows(value: Any, total: int) -> bool:
    """Whether the entries of a value could be one for each row (or two, in guidance halves)."""
    if isinstance(value, Mapping):
        return any(_may_hold_rows(each, total) for each in value.values())
    if isinstance(value, list | tuple):
        if all(each is None or isinstance(each, bool | int | float) for each in value):
            return False  # sizes, scales, one for each network
        return len(value) == total or any(_may_hold_rows(each, total) for each in value)
    entries = _entries(value)
    return entries is not None and entries in (total, 2 * total)


def _dimensions(value: Any) -> int:
    return len(getattr(value, "shape", ()))


def _is_one(name: str, value: Any, depth: int) -> bool:
    """Whether this is one picture, or the frames of one video, without an axis of rows."""
    if isinstance(value, list | tuple):
        first = value[0] if value else None
        return depth == 5 and not isinstance(first, list | tuple) and _dimensions(first) < 4
    return _dimensions(value) < depth - ("mask" in name)  # a mask may lack its channel


def _is_ambiguous(value: Any, depth: int) -> bool:
    """Whether rows could stand on more than one axis: batches in a list, masks without channels."""
    if isinstance(value, list | tuple):
        return any(_dimensions(each) >= depth and each.shape[0] > 1 for each in value)
    return _dimensions(value) < depth
