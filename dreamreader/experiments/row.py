"""Rows of an experiment, and the batches that they are run in."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamreader.errors import InvalidInput
from dreamreader.recording.labelled import evenly
from dreamreader.specs.data import Item
from dreamreader.sweep import Cell

MOST = 1_000_000  # rows of one run


@dataclass(frozen=True)
class Row:
    """One prompt with one seed under one condition.

    Attributes:
        number: place in the run.
        item: what it draws. prompt: of the item, or its target.
        condition: `unedited`, `edited`, `clean`, or the name of a control.
        cell: where it is changed. strength: how much.
        axes: values of further sweep axes.
        base: number of the row it is compared with (same prompt and seed, not edited).
        group: rows of different groups never share a batch.
        entry: place among the pairs of its group, where the method works on pairs.
    """

    number: int
    item: Item
    prompt: str
    seed: int
    condition: str
    cell: Cell | None = None
    strength: float | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    base: int | None = None
    group: int = 0
    entry: int = 0

    def columns(self) -> dict[str, Any]:
        """The row as plain values, for tables and metrics."""
        cell = self.cell
        found: dict[str, Any] = {
            "row": self.number,
            "item": self.item.id,
            "prompt": self.prompt,
            "seed": self.seed,
            "condition": self.condition,
            "cell": None if cell is None else cell.label,
            "cell_place": None if cell is None else cell.place,
            "cell_steps": None if cell is None else cell.time,
            "cell_json": None if cell is None else json.dumps(cell.as_dict()),
            "strength": self.strength,
            "base": self.base,
            **self.axes,
        }
        if self.item.target is not None:
            found |= {"source_prompt": self.item.prompt, "target_prompt": self.item.target}
        return found | dict(self.item.columns)


@dataclass(frozen=True)
class Unit:
    """Rows that are run in one call, and written together: numbers `start` .. `stop - 1`."""

    number: int
    start: int
    stop: int

    def of(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows[self.start : self.stop]


def units(rows: Sequence[Row], most: int) -> list[Unit]:
    """Neighbouring rows of one group, at most `most` together and as evenly as it goes."""
    found: list[Unit] = []
    for start, stop in _groups(rows):
        for first, last in evenly(stop - start, most):
            found.append(Unit(len(found), start + first, start + last))
    return found


def turn_apart(prompts: Sequence[str | None]) -> int:
    """How far to turn a batch so that rows meet rows of other prompts, as many as can be.

    Example:
        >>> turn_apart(["a", "a", "b", "b"])  # two prompts with two seeds each
        2
    """
    count = len(prompts)
    unlike = [
        sum(prompts[n] != prompts[(n + turn) % count] for n in range(count))
        for turn in range(1, count)
    ]
    return 1 + unlike.index(max(unlike)) if unlike else 0


def _groups(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    start = 0
    for number in range(1, len(rows) + 1):
        if number == len(rows) or rows[number].group != rows[start].group:
            yield start, number
            start = number


def check_count(count: int, parts: Mapping[str, int]) -> None:
    """Refuse a sweep that nobody means, before its rows exist.

    Raises:
        InvalidInput: more than `MOST` rows; says how they come about.
    """
    if count > MOST:
        product = " x ".join(f"{size:,} {name}" for name, size in parts.items() if size != 1)
        raise InvalidInput(
            f"the sweep has {count:,} rows ({product}); a run has at most {MOST:,}. Sweep fewer "
            "values, or split it into several specs"
        )
