"""What methods of experiments share: places that are swept, the table of rows, and strengths."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field

from dreamreader.artifacts import Artifact
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job
from dreamreader.experiments.row import Row, check_count
from dreamreader.specs.data import Item
from dreamreader.specs.parts import Count, Part
from dreamreader.specs.subject import is_language
from dreamreader.sweep import Cell, grid

Tokens = int | str | list[int | str | list[int]] | None


A = TypeVar("A", bound=Artifact)


def load_saved(kind: type[A], file: str, field: str) -> A:
    """What a file that a method names holds.

    Args:
        field: of the method, for messages.

    Raises:
        InvalidInput: it is missing, damaged, or of another kind.
    """
    try:
        return kind.load(file)
    except OSError as error:
        raise InvalidInput(f"method.{field}: {error}") from error


class SweptPlaces(Part):
    """Where a sweep goes: sites x heads x tokens x step windows, each a cell of its own."""

    sites: str | list[str] = Field(description="Site strings or globs.")
    group: Literal["each", "block", "all"] | dict[str, str | list[str]] = Field(
        "each", description="Which sites change together: each alone, by block, all, or named sets."
    )
    windows: Count | list[tuple[int, int]] | None = Field(
        None, description="Step windows: a number of equal ones, or (start, stop) pairs."
    )
    branch: str | list[str] | None = Field(None, description="Guidance branch; all by default.")
    tokens: Tokens = Field(
        None, description="Tokens: an index, a word, a list of selections, or each."
    )
    positions: Count | None = Field(None, description="Number of tokens, for tokens: each.")
    heads: Literal["each"] | list[int | list[int]] | None = Field(
        None, description="Heads at ports that have them: each, or a list."
    )

    def check_cells(self, job: Job, times: int = 1, **parts: int) -> None:
        """Refuse a sweep that is too long; a long axis of tokens before its cells exist.

        Args:
            times: rows of each cell and prompt. parts: sizes of further axes.
        """
        rest = {"prompts": len(job.items), "seeds": len(job.seeds), **parts}
        check_size(positions=self.positions or 1, **rest)
        check_size(cells=len(self.cells(job)) * times, **rest)

    def cells(self, job: Job) -> list[Cell]:
        """The cells of a subject, windows before places in the order of `grid`."""
        if "cells" not in job.memory:
            job.memory["cells"] = self._cells(job)
        return job.memory["cells"]

    def _cells(self, job: Job) -> list[Cell]:
        if isinstance(self.windows, int) and job.steps is None:
            raise InvalidInput(
                "method.windows: a language model has no denoising steps; leave windows out"
            )
        return grid(
            job.reader,
            self.sites,
            group=self.group,
            windows=self.windows,
            steps=job.steps,
            branch=self.branch,
            tokens=_tokens(self.tokens),
            positions=self.positions,
            heads=_tokens(self.heads),
        )


class RowTable:
    """Collects rows: numbers them, and finds the row that another is compared with."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._bases: dict[tuple[str, str, int], int] = {}
        self.group = 0

    def add(
        self,
        item: Item,
        seed: int,
        condition: str,
        *,
        target: bool = False,
        base: str | None = "unedited",
        **rest: Any,
    ) -> Row:
        """Appends a row; `base` names the condition of the row that it is compared with."""
        prompt = item.target if target else item.prompt
        assert prompt is not None
        number = len(self.rows)
        compared = self._bases.get((base, item.id, seed)) if base and base != condition else None
        row = Row(number, item, prompt, seed, condition, base=compared, group=self.group, **rest)
        self._bases.setdefault((condition, item.id, seed), number)
        self.rows.append(row)
        return row

    def add_unedited(self, job: Job, controls: Sequence[str]) -> list[tuple[Item, int]]:
        """Every prompt with every seed as it is, and target prompts where they are a control.

        Returns:
            The pairs of prompt and seed.
        """
        pairs = [(item, seed) for item in job.items for seed in job.seeds]
        for item, seed in pairs:
            self.add(item, seed, "unedited")
        if "target_prompt" in controls and all(item.target for item, _ in pairs):
            for item, seed in pairs:
                self.add(item, seed, "target_prompt", target=True)
        return pairs

    def next_group(self) -> None:
        """What follows shares no batch with what is there."""
        self.group += 1


def alphas(rows: Sequence[Row], *axes: str) -> dict[tuple[Any, ...], list[float]]:
    """Strengths of a batch by condition, cell and further axes; 0 for the rows of all others."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for number, row in enumerate(rows):
        if row.cell is not None and row.strength is not None:
            key = (row.condition, row.cell, *map(row.axes.get, axes))
            found.setdefault(key, [0.0] * len(rows))[number] = row.strength
    return found


def selection_of(cell: Cell) -> dict[str, Any]:
    """The selection of a cell, for edits that know no heads."""
    return {name: value for name, value in cell.selection.items() if name != "heads"}


def one_selection(cells: Sequence[Cell], what: str) -> Any:
    """The tokens of all cells.

    Raises:
        InvalidInput: they differ; `what` says for whom they may not.
    """
    chosen = {repr(cell.selection["tokens"]): cell.selection["tokens"] for cell in cells}
    if len(chosen) > 1:
        raise InvalidInput(
            f"method.tokens: cells are edited at different tokens ({', '.join(chosen)}); {what} "
            "one selection, write a spec for each"
        )
    return next(iter(chosen.values()))


def check_one_kind(name: str, source: Reader, job: Job) -> None:
    """Refuse a source that is a pipeline where the subject is a language model, or the reverse.

    Args:
        name: of the source, for the message.
    """
    kinds = ("a pipeline", "a language model")
    if is_language(source) != job.is_language:
        raise InvalidInput(
            f"method.source: {name} is {kinds[is_language(source)]} and the subject "
            f"{job.spec.subject.model} {kinds[job.is_language]}, whose calls and tokens have no "
            "partners; give two of one kind"
        )


def check_size(**parts: int) -> None:
    """Refuse a table that is too long, by the sizes of its axes."""
    total = 1
    for size in parts.values():
        total *= size
    check_count(total, {name.replace("_", " "): size for name, size in parts.items()})


def _tokens(value: Any) -> Any:
    """Inner lists as tuples, which stand for tokens (or heads) that are chosen together."""
    if not isinstance(value, list):
        return value
    return [tuple(each) if isinstance(each, list) else each for each in value]
