"""Trials of latents: what each candidate does to a few pictures, and which are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job
from dreamreader.experiments.methods.base import RowTable
from dreamreader.experiments.methods.sae_choice import (
    LEVELS,
    FeatureSet,
    LatentChoice,
    LatentMeans,
    set_name,
)
from dreamreader.experiments.row import Row
from dreamreader.metrics import Outputs
from dreamreader.recording.labelled import evenly
from dreamreader.specs.data import Item
from dreamreader.specs.parts import listed_seeds
from dreamreader.sweep import Cell

EditsOf = Callable[[Sequence[Row], Mapping[tuple[str, str], FeatureSet]], list[Any]]
"""Edits of rows, with the latents of each condition and name."""

CHOICE = "choice.json"  # of the run folder
DIFFERENCE = "difference"  # condition of the difference of means
STARTS = 3  # sets that are improved, as the best one may lead nowhere


@dataclass(frozen=True)
class Trial:
    """What one set did at one strength.

    Attributes:
        succeeded, reached, kept: shares of its pictures.
    """

    latents: FeatureSet
    strength: float
    succeeded: float
    reached: float
    kept: float

    @property
    def order(self) -> tuple[float, ...]:
        """Larger is better: success, then what was reached and kept, then the weaker and smaller
        one."""
        own = self.succeeded, self.reached + self.kept
        return *own, -abs(self.strength), -len(self.latents.features)

    def as_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("strength", "succeeded", "reached", "kept")}
        return {**asdict(self.latents), **own}


@dataclass(eq=False)
class Trials:
    """Runs settings on the trial's pictures, batch by batch.

    Args:
        job: of the experiment. choice: what is wanted. cell: where. edits_of: makes the edits.
    """

    job: Job
    choice: LatentChoice
    cell: Cell
    edits_of: EditsOf
    _plain: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def choose(self, means: LatentMeans, label: str, strengths: Sequence[float]) -> dict[str, Any]:
        """Tries the candidates of a label, then sets: the best of each size, by name."""
        choice, where = self.choice, self.choice.marks(means, label)
        singles = [replace(one, where=where) for one in means.candidates(label, choice.candidates)]
        if not singles:
            raise InvalidInput(
                f"method.choose: no latent is more active in {label!r} than elsewhere"
            )
        tried = self.run(label, singles, strengths)
        ranked = _best_of_each(tried)
        rivals = choice.rivals(means.labels, label)
        found = {}
        for size in choice.sizes:
            starts = ranked
            if size > 1:
                sets = [
                    replace(one, where=where)
                    for one in _propose(means, label, rivals, size, ranked)
                ]
                starts = _best_of_each(self.run(label, sets, strengths))
            chosen = self._improve(starts, means, label, rivals, size)
            found[set_name(label, size)] = chosen.as_dict() | {"target": label, "size": size}
        return {"sets": found, "tried": [each.as_dict() for each in tried]}

    def _improve(
        self,
        starts: Sequence[Trial],
        means: LatentMeans,
        label: str,
        rivals: Sequence[str],
        size: int,
    ) -> Trial:
        """Changes the first sets in one thing as long as that does more; gives the best."""
        choice, best = self.choice, starts[0]
        # what is removed has no level, and needs no latents of others
        others, shares = (rivals, LEVELS) if choice.goal == "add" else ((), ())
        for one in starts[:STARTS]:
            for _ in range(choice.rounds):
                sets = means.neighbours(one.latents, label, others, size, choice.candidates, shares)
                if one.succeeded == 1 or not sets:
                    break
                nearby = _best_of_each(self.run(label, sets, [one.strength]))[0]
                if nearby.order <= one.order:
                    break
                one = nearby
            best = max(best, one, key=lambda each: each.order)
        return best

    def choose_strength(
        self, label: str, strengths: Sequence[float], condition: str
    ) -> dict[str, Any]:
        """The best strength of an edit that has no latents."""
        tried = self.run(label, [FeatureSet(())], strengths, condition)
        return max(tried, key=lambda each: each.order).as_dict()

    def run(
        self,
        label: str,
        sets: Sequence[FeatureSet],
        strengths: Sequence[float],
        condition: str = "edited",
    ) -> list[Trial]:
        """Every set at every strength on the trial's pictures that concern a label."""
        pairs = self._pairs(label)
        table, settings = RowTable(), [(each, s) for each in sets for s in strengths]
        named = {(condition, str(n)): each for n, (each, _) in enumerate(settings)}
        for number, (_, strength) in enumerate(settings):
            axes = {"features": str(number), "target": label}
            for item, seed in pairs:
                table.add(item, seed, condition, cell=self.cell, strength=strength, axes=axes)
        found: list[Mapping[str, Any]] = []
        for start, stop in evenly(len(table.rows), self.job.batch):
            found += self._measure(table.rows[start:stop], named)
        size, choice = len(pairs), self.choice
        trials = []
        for number, (latents, strength) in enumerate(settings):
            own = found[number * size : (number + 1) * size]
            shares = [
                sum(map(judge, own)) / size
                for judge in (choice.succeeded, choice.reached, lambda row: bool(row[choice.kept]))
            ]
            trials.append(Trial(latents, strength, *shares))
        return trials

    def _pairs(self, label: str) -> list[tuple[Item, int]]:
        """Prompts and seeds that are tried for a label."""
        choice = self.choice
        items = [item for item in choice.items("trial") if choice.concerns(item, label)]
        pairs = [(item, seed) for item in items for seed in listed_seeds(choice.trial_seeds)]
        if not pairs:
            raise InvalidInput(
                f"method.choose.trial: no prompt to {choice.goal} {label!r}; give more prompts"
            )
        return pairs[: choice.trial_rows]

    def _measure(
        self, rows: Sequence[Row], named: Mapping[tuple[str, str], FeatureSet]
    ) -> list[Mapping[str, Any]]:
        """What the job's metrics read from edited pictures."""
        job, choice = self.job, self.choice
        self._draw_plain(rows)
        result, latents = job.draw(
            [row.prompt for row in rows],
            [row.seed for row in rows],
            self.edits_of(rows, named),
        )
        outputs = job.outputs(rows, result, latents)
        plain = torch.stack([self._plain[row.item.id, row.seed] for row in rows])
        reference = Outputs(outputs.rows, plain)
        columns: dict[str, Any] = {}
        for metric in job.metrics:
            if set(metric.needs) <= {"images"}:
                columns |= metric.measure(outputs, reference)
        missing = [name for name in (choice.success, choice.kept) if name not in columns]
        if missing:
            there = ", ".join(columns) or "none"
            raise InvalidInput(
                f"method.choose: no metric of pictures gives {missing[0]!r}; there are {there}"
            )
        for name in (choice.success, choice.kept):
            if not all(each is None or isinstance(each, bool) for each in columns[name]):
                raise InvalidInput(
                    f"method.choose: {name} is a number, not whether something holds"
                )
        return [
            dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)
        ]

    def _draw_plain(self, rows: Sequence[Row]) -> None:
        """Pictures without edits, each drawn once."""
        job = self.job
        wanted = {(row.item.id, row.seed): row for row in rows}
        missing = [row for key, row in wanted.items() if key not in self._plain]
        if missing:
            prompts, seeds = [row.prompt for row in missing], [row.seed for row in missing]
            outputs = job.outputs(missing, *job.draw(prompts, seeds))
            assert outputs.images is not None
            for row, image in zip(missing, outputs.images, strict=True):
                self._plain[row.item.id, row.seed] = image


def _propose(
    means: LatentMeans, label: str, rivals: Sequence[str], size: int, ranked: Sequence[Trial]
) -> list[FeatureSet]:
    """Sets of at most a size: a label's latents with and without those of others at 0, what differs
    most in both directions, and what did most alone."""
    few = max(1, size // 4)
    effective = [each.latents for each in ranked[:few]]
    alone = FeatureSet(
        tuple(j for each in effective for j in each.features),
        tuple(level for each in effective for level in each.levels or ()),
    )
    return list(
        dict.fromkeys(
            [
                means.by_label(label, rivals, size, max(1, size // 2)),
                means.by_label(label, rivals, size, few),
                means.by_label(label, rivals, size, max(1, few // 2)),
                means.by_contrast(label, few, False),
                means.by_contrast(label, max(1, size // 2), True),
                alone,
            ]
        )
    )


def load_or_choose(
    trials: Trials,
    means: LatentMeans,
    strengths: Sequence[float],
    difference_strengths: Sequence[float] | None,
) -> dict[str, FeatureSet]:
    """The chosen sets by name, label by label; those of the run folder are not chosen again."""
    folder = trials.job.folder
    assert folder is not None
    notes = folder.read(CHOICE) or {"run": folder.run, "labels": {}}
    if notes["run"] != folder.run:
        raise InvalidInput(f"{folder.path / CHOICE} is of another run; delete it and run again")
    for label in trials.choice.labels():
        if label not in notes["labels"]:
            own = trials.choose(means, label, strengths)
            if difference_strengths is not None:
                own[DIFFERENCE] = trials.choose_strength(label, difference_strengths, DIFFERENCE)
            notes["labels"][label] = own
            folder.write(CHOICE, notes)
    return {
        name: FeatureSet(
            tuple(each["features"]),
            tuple(each["levels"]),
            None if each["where"] is None else tuple(each["where"]),
        )
        for own in notes["labels"].values()
        for name, each in own["sets"].items()
    }


def _best_of_each(trials: Sequence[Trial]) -> list[Trial]:
    """The best strength of every set, best sets first."""
    best: dict[FeatureSet, Trial] = {}
    for each in trials:
        if each.latents not in best or each.order > best[each.latents].order:
            best[each.latents] = each
    return sorted(best.values(), key=lambda each: each.order, reverse=True)
