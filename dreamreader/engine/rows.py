"""Rows of a run: how prompts, seeds and per-row strengths are brought to one length."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamreader.engine.cache import Row
from dreamreader.engine.request import EditRequest
from dreamreader.errors import InvalidInput, check_text


@dataclass(frozen=True)
class Plan:
    """One prompt and one seed for each row."""

    prompts: tuple[Any, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rows(self) -> list[Row]:
        pairs = zip(self.prompts, self.seeds, strict=True)
        return [Row(n, str(p) if isinstance(p, str) else None, s) for n, (p, s) in enumerate(pairs)]


def plan_rows(
    prompts: str | Sequence[str], seeds: int | Sequence[int] | None, edits: Sequence[EditRequest]
) -> Plan:
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
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise InvalidInput("prompts is empty: at least one prompt is needed")
    wrong = [each for each in listed if not isinstance(each, str)]
    if wrong:
        raise InvalidInput(f"prompts must be strings, got {type(wrong[0]).__name__} {wrong[0]!r}")
    for number, each in enumerate(listed):
        check_text(each, f"prompt {number}")
    lengths = {"prompts": len(listed)}
    if seeds is not None and not isinstance(seeds, int):
        seeds = [_seed(each) for each in seeds]
        if not seeds:
            raise InvalidInput("seeds is empty: give an int, or one seed for each row")
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
    if isinstance(seeds, int):
        first = _seed(seeds)
        seeds = [first + n if several else first for n in range(count)]
    full_prompts = tuple(listed if several else listed * count)
    return Plan(full_prompts, tuple(seeds if len(seeds) > 1 else list(seeds) * count))


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidInput(f"a seed is an int, got {value!r}")
    number = int(value.__index__())
    if not 0 <= number < 2**63:
        raise InvalidInput(f"a seed is between 0 and 2**63 - 1, got {number}")
    return number


def chunked(arguments: Mapping[str, Any], start: int, stop: int, total: int) -> dict[str, Any]:
    """The share of rows start .. stop - 1 in every argument that has one entry for each row."""
    from torch import Tensor

    if start == 0 and stop == total:
        return dict(arguments)
    found = {}
    for name, value in arguments.items():
        per_row = isinstance(value, list | tuple) and len(value) == total and name in _PER_ROW
        batched = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == total
        found[name] = value[start:stop] if per_row or batched else value
    return found


_PER_ROW = {
    "prompt",
    "prompt_2",
    "prompt_3",
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
    "generator",
    "image",
    "mask_image",
    "control_image",
}
