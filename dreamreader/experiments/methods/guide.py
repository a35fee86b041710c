"""Probe guidance: probes fitted to labelled prompts, and rows moved along their gradients."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from dreamreader import edits as kinds
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.base import RowTable, alphas, selection_of
from dreamreader.experiments.methods.guide_probes import JOINED, FittedProbes, ProbedLabels
from dreamreader.experiments.row import Row
from dreamreader.specs.data import Item
from dreamreader.specs.parts import Count
from dreamreader.sweep import Cell

UNIFORM = "uniform"
CONTROLS = ("random_probe", "difference", "target_prompt")


class GuideMethod(ProbedLabels):
    """Fits probes of labels at every site, and moves the prompts of `data` towards others.

    Every row has a column `target` with the labels that it is moved to, such as `blue` or
    `blue + white`, which the detector reads. Controls: a probe with random weights of the same
    norms; where there is a target, a difference of means at the same sites (`difference`), in
    strengths of its own; the target prompt itself where `data` are pairs.
    """

    kind: Literal["guide"] = "guide"
    group: Literal["each", "block", "all"] | dict[str, str | list[str]] = Field(
        "all", description="Which sites change together: each alone, by block, all, or named sets."
    )
    target: dict[str, str] = Field(
        default_factory=dict,
        description="Label to reach by attribute; uniform: the labels in turn, row by row.",
    )
    avoid: dict[str, str] = Field(
        default_factory=dict,
        description="Column of `data` with the label to move away from, by attribute.",
    )
    strengths: list[float] = Field(min_length=1, description="alpha of the guidance.")
    iterations: list[Count] = Field([1], min_length=1, description="Inner steps.")
    gamma: float = Field(1.0, description="Factor of alpha from one inner step to the next.")
    trust: float | None = Field(
        None, ge=0, description="Largest change, as a multiple of the norm of the activation."
    )
    difference_strengths: list[float] = Field(
        default_factory=lambda: [1.0, 2.0], description="Multiples of the difference of means."
    )
    effect: str | None = Field(
        None, description="Column of a metric that the best cell and strength are chosen by."
    )
    controls: list[Literal["random_probe", "difference", "target_prompt"]] = Field(
        default_factory=lambda: list(CONTROLS)
    )

    @model_validator(mode="after")
    def _attributes_fit(self) -> "GuideMethod":
        if not self.target and not self.avoid:
            raise ValueError("give labels as target, as avoid, or as both")
        for name in (*self.target, *self.avoid):
            if name not in self.labels:
                raise ValueError(f"{name} is no attribute of labels ({', '.join(self.labels)})")
        return self

    def check(self, job: Job) -> None:
        inner = {"strengths": len(self.strengths), "inner_steps": len(self.iterations)}
        self.check_cells(job, conditions=len(list(self._sweeps())), **inner)
        for row in job.rows:
            self.away(job, row)

    def inputs(self, job: Job) -> dict[str, Any]:
        columns = self.labels.values()
        listed = [[each.prompt, *map(each.columns.get, columns)] for each in self.fit_items()]
        return {"fit": hashlib.sha256(repr(listed).encode()).hexdigest()}

    def rows(self, job: Job) -> list[Row]:
        pairs = [(item, seed) for item in job.items for seed in job.seeds]
        named = [self._target_column(job, number, item) for number, (item, _) in enumerate(pairs)]
        table = RowTable()

        def add(condition: str, more: Mapping[str, Any] | None = None, **rest: Any) -> None:
            for (item, seed), axes in zip(pairs, named, strict=True):
                table.add(item, seed, condition, axes={**axes, **(more or {})}, **rest)

        add("unedited")
        if "target_prompt" in self.controls and all(item.target for item, _ in pairs):
            add("target_prompt", target=True)
        for condition, strengths, inner in self._sweeps():
            for cell, strength, count in itertools.product(self.cells(job), strengths, inner):
                more = {} if count is None else {"iterations": count}
                add(condition, more, cell=cell, strength=strength)
        return table.rows

    def _target_column(self, job: Job, number: int, item: Item) -> dict[str, str]:
        """The column target of a row, where its data have none.

        Raises:
            InvalidInput: they have another one.
        """
        if not self.target:
            return {}
        target = self._towards(job, number)
        own = str(item.columns.get("target", target))
        if own != target:
            raise InvalidInput(
                f"method.target: entry {item.id!r} of data has the target {own!r}, the method "
                f"moves it to {target!r}"
            )
        return {} if "target" in item.columns else {"target": target}

    def _sweeps(self) -> Iterator[tuple[str, list[float], Sequence[int | None]]]:
        """Conditions with their strengths and inner steps."""
        yield "edited", self.strengths, self.iterations
        if "random_probe" in self.controls:
            yield "random_probe", self.strengths, self.iterations
        if "difference" in self.controls and self.target:
            yield "difference", self.difference_strengths, [None]

    def prepare(self, job: Job) -> None:
        """Probes and means of the run folder; what is missing is fitted and written there."""
        job.memory["fitted"] = self.load_or_fit(job)

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        found: list[Any] = []
        for (condition, cell, inner), alpha in alphas(rows, "iterations").items():
            if condition == "difference":
                found += self._differences(job, rows, cell, alpha)
            else:
                random = condition == "random_probe"
                found.append(self._guidance(job, rows, random, cell, inner, alpha))
        return found

    def _guidance(
        self,
        job: Job,
        rows: Sequence[Row],
        random: bool,
        cell: Cell,
        inner: int,
        alpha: list[float],
    ) -> Any:
        made: FittedProbes = job.memory["fitted"]
        return kinds.ProbeGuidance(
            cell.sites,
            made.mlps(cell.sites, random),
            [self._names(row) for row in rows],
            [self.away(job, row) for row in rows],
            alpha,
            gamma=self.gamma,
            iterations=inner,
            trust=self.trust,
            pool=self.probe.pool,
            **selection_of(cell),
        )

    def _differences(
        self, job: Job, rows: Sequence[Row], cell: Cell, alpha: list[float]
    ) -> list[Any]:
        """For each label to reach, the difference of its mean to the others', on the rows that want
        it."""
        made: FittedProbes = job.memory["fitted"]
        found = []
        for name in dict.fromkeys(name for row in rows for name in self._names(row)):
            own = [
                strength if name in self._names(row) else 0.0
                for row, strength in zip(rows, alpha, strict=True)
            ]
            if any(own):
                vectors = {site: made.contrast(site, name) for site in cell.sites}
                found.append(kinds.Steer(cell.sites, vectors, own, **selection_of(cell)))
        return found

    def _towards(self, job: Job, number: int) -> str:
        """The labels that a row is moved to, joined as a detector's target."""
        chosen = []
        for attribute, label in self.target.items():
            listed = self.values(job)[attribute]
            if label not in (UNIFORM, *listed):
                raise UnknownName(f"method.target.{attribute}", label, listed)
            chosen.append(listed[number % len(listed)] if label == UNIFORM else label)
        return JOINED.join(chosen)

    def _names(self, row: Row) -> list[str]:
        """The probe's labels that a row is moved to."""
        if not self.target:
            return []
        target = row.axes["target"] if "target" in row.axes else row.item.columns["target"]
        parts = str(target).split(JOINED)
        return [f"{name}={value}" for name, value in zip(self.target, parts, strict=True)]

    def away(self, job: Job, row: Row) -> list[str]:
        """The probe's labels that a row is moved away from; none that it is moved to."""
        found = []
        for attribute, column in self.avoid.items():
            value, known = str(row.item.columns.get(column)), self.values(job)[attribute]
            if value not in known:
                where = f"method.avoid.{attribute}: {column} of entry {row.item.id!r}"
                raise UnknownName(where, value, known)
            found.append(f"{attribute}={value}")
        return [name for name in found if name not in self._names(row)]
