"""Edits as they are written in the spec, swept over named values."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from dreamreader import edits as kinds
from dreamreader.engine import Box
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, check_size
from dreamreader.experiments.row import Row
from dreamreader.specs.data import RESERVED
from dreamreader.specs.parts import Part

# "$name": the value of a sweep axis in each row
Swept = Annotated[str, Field(pattern=r"^\$")]


def _no_octal(value: Any) -> Any:
    if isinstance(value, str) and re.match(r"[-+]?0\d", value):
        raise PydanticCustomError(
            "number_text",
            "{text} is no plain number: write it without quotes and the leading 0",
            {"text": repr(value)},
        )
    return value


Number = Annotated[float | Swept, BeforeValidator(_no_octal, json_schema_input_type=float | Swept)]
_NUMBERS = ("alpha", "sigma", "strength", "factor", "low", "high")
Window = int | tuple[int, int] | Swept | None


class Direction(Part):
    """A direction: from a file, random, or its numbers."""

    file: str | None = Field(None, description="Safetensors file with one tensor for each site.")
    random: int | None = Field(None, description="Seed of a random unit direction.")
    norm: float = Field(1.0, gt=0, description="Norm of a random direction.")
    values: list[float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Direction":
        given = [n for n in ("file", "random", "values") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of file, random and values, got {given or 'none'}")
        return self


class Rectangle(Part):
    """A box of the picture, in shares of width and height."""

    box: tuple[float, float, float, float] = Field(description="Left, top, right, bottom.")


class EditSpec(Part):
    """What all edits of a spec have: where, when, and on which rows of guidance."""

    site: str | list[str]
    steps: Window = Field(None, description="A step, or (start, stop).")
    fraction: tuple[float, float] | Swept | None = Field(
        None, description="Share of the trajectory, low and high."
    )
    branch: str | list[str] | None = None
    tokens: int | str | list[int] | Rectangle | None = Field(
        None, description="Indices, a word of the prompt, or box: [left, top, right, bottom]."
    )
    heads: int | list[int] | Swept | None = None
    channels: list[int] | None = None

    def make(self, values: Mapping[str, Any], rows: Sequence[int], job: Job) -> Any:
        """The edit of rows that share all values."""
        raise NotImplementedError

    def common(self, values: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """Arguments that all edits take."""
        steps = fill(self.steps, values)
        tokens = self.tokens
        if isinstance(tokens, Rectangle):
            tokens = Box(*tokens.box)
        return {
            "steps": range(*steps) if isinstance(steps, list | tuple) else steps,
            "fraction": _pair(fill(self.fraction, values)),
            "branch": self.branch,
            "tokens": tokens,
            "heads": fill(self.heads, values),
            "channels": self.channels,
            "rows": list(rows),
        }

    def at(self, values: Mapping[str, Any]) -> Any:
        site = fill(self.site, values)
        return site if isinstance(site, str) else tuple(site)


class SteerSpec(EditSpec):
    """x + alpha v."""

    kind: Literal["steer"]
    direction: Direction
    alpha: Number = 1.0
    norm_match: bool = False

    def make(self, values: Mapping[str, Any], rows: Sequence[int], job: Job) -> Any:
        site, alpha = self.at(values), fill_number(self.alpha, values)
        vector = directions(self.direction, site, job)
        more = self.common(values, rows)
        return kinds.Steer(site, vector, alpha, norm_match=self.norm_match, **more)


class AblateSpec(EditSpec):
    """Zero, noise, or the component along a direction taken out."""

    kind: Literal["ablate"]
    ablation: Literal["zero", "project", "noise"] = "zero"
    direction: Direction | None = None
    sigma: Number = 1.0
    strength: Number = 1.0
    one_sided: bool = False
    per_step: bool = Field(False, description="The direction has one entry for each step.")

    def make(self, values: Mapping[str, Any], rows: Sequence[int], job: Job) -> Any:
        site = self.at(values)
        vector = None if self.direction is None else directions(self.direction, site, job)
        return kinds.Ablate(
            site,
            self.ablation,
            direction=vector,
            sigma=fill_number(self.sigma, values),
            strength=fill_number(self.strength, values),
            one_sided=self.one_sided,
            per_step=self.per_step,
            **self.common(values, rows),
        )


class ScaleSpec(EditSpec):
    """gamma x."""

    kind: Literal["scale"]
    factor: Number

    def make(self, values: Mapping[str, Any], rows: Sequence[int], job: Job) -> Any:
        factor = fill_number(self.factor, values)
        return kinds.Scale(self.at(values), factor, **self.common(values, rows))


class ClampSpec(EditSpec):
    """Values held between low and high."""

    kind: Literal["clamp"]
    low: Number | None = None
    high: Number | None = None

    def make(self, values: Mapping[str, Any], rows: Sequence[int], job: Job) -> Any:
        bounds = [
            None if each is None else fill_number(each, values) for each in (self.low, self.high)
        ]
        return kinds.Clamp(self.at(values), bounds[0], bounds[1], **self.common(values, rows))


AnyEdit = Annotated[SteerSpec | AblateSpec | ScaleSpec | ClampSpec, Field(discriminator="kind")]


class EditMethod(Method):
    """Runs edits as they are written, at every combination of the swept values (or see `combine`).

    `$name` in an edit stands for the value of the axis `name` of `sweep`.
    """

    kind: Literal["edit"] = "edit"
    edits: list[AnyEdit] = Field(min_length=1)
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict, description="Named values; all combinations are run."
    )
    combine: Literal["product", "zip"] = Field(
        "product", description="zip: the first value of every axis, then the second of every axis."
    )

    @model_validator(mode="after")
    def _axes_fit(self) -> "EditMethod":
        used = {name for edit in self.edits for name in _names(edit.model_dump())}
        for name in used - set(self.sweep):
            raise ValueError(f"${name} is in an edit, but sweep has no {name}")
        for name in set(self.sweep) - used:
            raise ValueError(f"sweep.{name}: no edit has ${name}")
        for edit in self.edits:
            for field in _NUMBERS:
                axis = str(getattr(edit, field, "")).removeprefix("$")
                for value in self.sweep.get(axis, ()):
                    if isinstance(value, bool) or not isinstance(value, int | float):
                        raise ValueError(f"sweep.{axis}: {field} needs numbers, got {value!r}")
        for name, values in self.sweep.items():
            if name in RESERVED:
                raise ValueError(f"sweep.{name}: every row has a column {name}, rename the axis")
            if not values:
                raise ValueError(f"sweep.{name} is empty")
            if self.combine == "product" and len(set(map(str, values))) < len(values):
                raise ValueError(f"sweep.{name} has a value twice")
        lengths = {name: len(values) for name, values in self.sweep.items()}
        if self.combine == "zip" and len(set(lengths.values())) > 1:
            raise ValueError(f"combine: zip needs axes of one length, got {lengths}")
        points = list(zip(*(map(str, values) for values in self.sweep.values()), strict=False))
        if self.combine == "zip" and len(set(points)) < len(points):
            raise ValueError("sweep has a combination twice")
        return self

    def check(self, job: Job) -> None:
        axes = {name: len(values) for name, values in self.sweep.items()}
        axes = dict(list(axes.items())[:1]) if self.combine == "zip" else axes
        check_size(prompts=len(job.items), seeds=len(job.seeds), **axes)

    def inputs(self, job: Job) -> dict[str, Any]:
        found = {}
        for number, edit in enumerate(self.edits):
            direction = getattr(edit, "direction", None)
            if direction is not None and direction.file is not None:
                vectors = _of_file(Path(direction.file))
                found[f"edits.{number}.direction"] = {k: vectors[k] for k in sorted(vectors)}
        return found

    def rows(self, job: Job) -> list[Row]:
        columns = map(self._column_values, self.sweep)
        points = (
            zip(*columns, strict=True) if self.combine == "zip" else itertools.product(*columns)
        )
        table = RowTable()
        for item in job.items:
            for seed in job.seeds:
                table.add(item, seed, "unedited")
        for point in points:
            for item in job.items:
                for seed in job.seeds:
                    table.add(item, seed, "edited", axes=dict(zip(self.sweep, point, strict=True)))
        return table.rows

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for number, row in enumerate(rows):
            if row.condition == "edited":
                point = dict(row.axes)
                groups.setdefault(repr(point), (self._point(point), []))[1].append(number)
        return [
            edit.make(values, numbers, job)
            for values, numbers in groups.values()
            for edit in self.edits
        ]

    def _point(self, shown: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the sweep that a row shows."""
        return {
            name: self.sweep[name][self._column_values(name).index(value)]
            for name, value in shown.items()
        }

    def _column_values(self, name: str) -> list[Any]:
        """The values of an axis as one column of a table holds them: as text unless they are all
        numbers, all truth values or all text."""
        values = self.sweep[name]
        kinds = {float if type(each) is int else type(each) for each in values}
        return values if len(kinds) == 1 and kinds <= {float, bool, str} else list(map(str, values))


def fill(value: Any, values: Mapping[str, Any]) -> Any:
    """A value of the spec with `$name` replaced."""
    if isinstance(value, str) and value.startswith("$"):
        return values[value[1:]]
    return value


def fill_number(value: Any, values: Mapping[str, Any]) -> float:
    """A number of the spec, or that of a sweep."""
    return float(fill(value, values))


def directions(source: Direction, site: Any, job: Job) -> Any:
    """A direction as `Steer` takes it: a tensor, or one by site.

    Raises:
        InvalidInput: the file is missing, or no safetensors file.
        UnknownName: it has no direction for a site.
    """
    if source.values is not None:
        return torch.tensor(source.values)
    patterns = [site] if isinstance(site, str) else list(site)
    names = [name for each in patterns for name in job.reader.sites(each).names]
    if source.random is not None:
        return {
            name: _random(width, source.random + n, source.norm)
            for n, (name, width) in enumerate(_widths(job, names).items())
        }
    path = Path(source.file or "")
    found = _of_file(path)
    for name in names:
        if name not in found:
            raise UnknownName(f"direction in {path} for site", name, found)
    return {name: found[name] for name in names}


def _of_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from dreamreader.artifacts.file import check_file

    try:
        check_file(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"direction file {path}: {error}") from error


def _widths(job: Job, names: Sequence[str]) -> dict[str, int]:
    from dreamreader.sweep import site_widths

    key = ("widths", tuple(names))
    if key not in job.memory:
        few = {} if job.is_language else {**job.settings, "num_inference_steps": 1}
        job.memory[key] = site_widths(job.reader, list(names), job.items[0].prompt, **few)
    return job.memory[key]


def _random(width: int, seed: int, norm: float) -> Tensor:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return vector * (norm / vector.norm())


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _names(value: Any) -> set[str]:
    """Names behind `$` anywhere in plain values."""
    if isinstance(value, str):
        return {value[1:]} if value.startswith("$") else set()
    parts = value.values() if isinstance(value, dict) else value
    return set().union(*map(_names, parts)) if isinstance(value, dict | list | tuple) else set()
