"""Training probes on more rows than memory holds: batch by batch, several times over."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import Recipe
from dreamreader.probes.controls import WIDTH, random_rows
from dreamreader.probes.fit import PER_STEP, assemble_probe
from dreamreader.probes.net import StackedMlps
from dreamreader.probes.objective import ProbeObjective, check_counts, objective
from dreamreader.probes.probe import Probe
from dreamreader.probes.scores import Held, score_attributes
from dreamreader.probes.source import Batches, LabelledPart, LabelledSource, Survey, survey_rows
from dreamreader.probes.train import (
    Design,
    TrainedMlps,
    TrainingRows,
    describe_training,
    epochs_of,
    recipe_of,
    train_nets,
)

Change = Callable[[LabelledPart, torch.Generator], LabelledPart]


def fit_batches(
    batches: Batches,
    validation: Batches,
    held_out: Batches,
    *,
    classes: Any = None,
    task: str = "classify",
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    per_step: str = "shared",
    pool: str = "token",
    loss: str = "softmax",
    class_weights: str | Mapping[str, float] | None = None,
    epochs: int = 5,
    patience: int = 2,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    controls: bool = True,
    site: str | None = None,
    branch: str | None = None,
    subject: str | None = None,
) -> Probe:
    """Trains a probe as `fit` does, on rows that come in batches.

    The rows to train on are read once for their mean, deviation and labels, then once in every
    epoch; memory holds a batch, and the logits of the rows that validate and measure.

    Args:
        batches: tuples (x [rows, features], labels[, fraction[, step]]) in an iterable that can be
            read again, such as a list or a `StoreDataset` with labels; or a function that gives one
            for the number of an epoch. Their order is that of the training: they come shuffled.
        validation, held_out: the same, of rows that choose the state that is kept and the
            temperature, and of rows that only measure. Rows of one prompt belong to one of the
            three.
        classes: names of the classes in their order, by attribute where there are several; needed
            but for regression.
        per_step: `shared`; `noise` (needs fractions); or `each` (needs steps).
        pool: how tokens became rows, for the card and for guidance.
        site, branch, subject: where the rows are from, for the card and for guidance.
        task, hidden, activation, loss, class_weights, epochs, patience, lr, batch_size, seed,
            controls: as in `fit`.

    Returns:
        A probe on raw activations, with its card.

    Raises:
        UnknownName: of a task, loss, label or other choice.
        InvalidInput: batches that can be read once only or lack what is needed, a class without
            rows, values that are not finite, or nothing that validates or is held out.
    """
    if per_step not in PER_STEP:
        raise UnknownName("per_step of a probe", per_step, PER_STEP)
    if classes is None and task != "regress":
        raise InvalidInput("fit_batches: give classes=, a batch may lack some of them")
    design = Design(tuple(hidden), activation)
    recipe = recipe_of(epochs, patience, lr, batch_size, seed)
    slots: dict[int, int] = {}
    sources = [
        LabelledSource(each, name, task, classes, per_step, slots)
        for each, name in zip(
            (batches, validation, held_out), ("batches", "validation", "held_out"), strict=True
        )
    ]
    survey = survey_rows(sources[0])
    labelled = sources[0].labelled
    assert labelled is not None
    check_counts(labelled, survey.counts)
    goal = objective(labelled, loss, class_weights, survey.counts)
    run = _StreamedFit(sources, survey, goal, recipe)
    trained = run.train_mlps(design)
    sizes = [int(survey.counts[-1]), len(trained.validation.slot), len(trained.held_out.slot)]
    counts = dict(zip(("train", "validation", "held_out"), sizes, strict=True))
    known = {
        "subject": subject,
        "site": site,
        "branch": branch,
        "steps": list(slots),
        "pool": pool,
        "per_step": per_step,
        "rows": counts,
        "groups": counts,
        "counts": dict(zip(labelled.labels, survey.counts.tolist(), strict=False)),
        "training": {**describe_training(design, recipe), "loss": goal.loss},
        "controls": run.controls(design, trained) if controls else {},
    }
    return assemble_probe(goal, trained, known)


class _StreamedFit:
    """Trains on batches, once for the probe and once for each control."""

    def __init__(
        self,
        sources: Sequence[LabelledSource],
        survey: Survey,
        goal: ProbeObjective,
        recipe: Recipe,
    ):
        self.train, self.validation, self.held_out = sources
        self.survey, self.goal, self.recipe = survey, goal, recipe
        self.noisy = self.train.per_step == "noise"

    def controls(self, design: Design, trained: TrainedMlps) -> dict[str, Any]:
        """As `controls.controls`; labels change hands, and random rows are drawn, by batch."""
        hidden, task, loss = design.hidden, self.goal.task, self.goal.loss
        other = () if hidden else (WIDTH,)
        found = {(hidden or (0,))[0]: trained}
        found[(other or (0,))[0]] = self.train_mlps(replace(design, hidden=other))
        return {
            "shuffled_labels": score_attributes(
                self.train_mlps(design, _shuffle).held_out, task, loss
            ),
            "random_feature": score_attributes(
                self.train_mlps(design, _random).held_out, task, loss
            ),
            "capacity_sweep": {
                str(width): score_attributes(each.held_out, task, loss)
                for width, each in sorted(found.items())
            },
        }

    @torch.inference_mode(False)
    def train_mlps(self, design: Design, change: Change = lambda part, _: part) -> TrainedMlps:
        seed, count = self.recipe.seed, len(self.survey.mean)
        learners = [
            _StreamedProbe(self.survey, n, self.goal, design, self.recipe, self.noisy)
            for n in range(count)
        ]

        def batches(epoch: int) -> Iterator[TrainingRows]:
            draw = torch.Generator().manual_seed(seed + epoch)
            for part in self.train.parts(epoch):
                yield from learners[part.slot].add(change(part, draw))
            for each in learners:
                yield from each.rest()

        def validate() -> dict[str, Tensor]:
            held = self._predict(self.validation, learners, change, seed)
            own = [held.slot == n for n in range(count)]
            return {
                str(n): each.losses(held.logits[own[n]], held.targets[own[n]])
                for n, each in enumerate(learners)
            }

        nets = {str(n): each.net for n, each in enumerate(learners)}
        histories = train_nets(nets, self.goal, batches, self.recipe, validate)
        held = [
            self._predict(each, learners, change, seed) for each in (self.validation, self.held_out)
        ]
        steps = list(self.train.slots) or None
        mlps = tuple(each.fold(None if steps is None else steps[each.slot]) for each in learners)
        epochs = tuple(epochs_of(each)[0] for each in histories.values())
        return TrainedMlps(mlps, held[0], held[1], epochs)

    def _predict(
        self,
        source: LabelledSource,
        learners: Sequence["_StreamedProbe"],
        change: Change,
        seed: int,
    ) -> Held:
        """The logits of all rows; those who have none are an error."""
        draw = torch.Generator().manual_seed(seed)
        logits, targets, slots = [], [], []
        for part in source.parts(0):
            part = change(part, draw)
            logits.append(learners[part.slot].logits(part).cpu())
            targets.append(part.targets.cpu())
            slots.append(torch.full((len(part.x),), part.slot))
        found = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)
        lacking = set(range(len(learners))) - set(found.tolist())
        if lacking:
            steps = list(self.train.slots)
            where = f" of step {steps[min(lacking)]}" if steps else ""
            raise InvalidInput(f"{source.name}: there are no rows{where}")
        return Held(torch.cat(logits), torch.cat(targets), torch.arange(len(found)), found)


class _StreamedProbe:
    """One MLP, and the rows for it as they come."""

    def __init__(
        self,
        survey: Survey,
        slot: int,
        goal: ProbeObjective,
        design: Design,
        recipe: Recipe,
        noisy: bool,
    ):
        self.slot, self.goal, self.size = slot, goal, recipe.batch_size
        self.mean, self.scale = survey.mean[slot], survey.scale[slot]
        regress = goal.task.kind == "regress"
        self.middle = survey.middle if regress else torch.zeros(())
        self.spread = survey.spread if regress else torch.ones(())
        outputs = len(goal.task.labels)
        sizes = (len(self.mean), *design.hidden, outputs)
        net = StackedMlps(1, sizes, design.activation, noisy, recipe.seed)
        self.net = net.to(self.mean.device)
        self.waiting: list[LabelledPart] = []

    def add(self, part: LabelledPart) -> Iterator[TrainingRows]:
        """Takes rows, and gives them as soon as there are enough for a step."""
        self.waiting.append(part)
        if sum(len(each.x) for each in self.waiting) >= self.size:
            yield from self._steps(self._take_waiting())

    def rest(self) -> Iterator[TrainingRows]:
        """Gives what is left at the end of an epoch."""
        if self.waiting:
            yield from self._steps(self._take_waiting())

    def _take_waiting(self) -> LabelledPart:
        waiting, self.waiting = self.waiting, []
        x, targets, fraction = (
            torch.cat([getattr(each, name) for each in waiting])
            for name in ("x", "targets", "fraction")
        )
        return LabelledPart(x, targets, fraction, self.slot)

    def _steps(self, part: LabelledPart) -> Iterator[TrainingRows]:
        x = self._standard(part.x)
        targets = part.targets
        if targets.is_floating_point():
            targets = (targets - self.middle) / self.spread
        for batch in torch.arange(len(part.x), device=x.device).split(self.size):
            yield TrainingRows(x[:, batch], targets[batch], part.fraction[batch], self.slot)

    def _standard(self, x: Tensor) -> Tensor:
        return ((x.float() - self.mean) / self.scale).unsqueeze(0)

    @torch.no_grad()
    def logits(self, part: LabelledPart) -> Tensor:
        """[rows, outputs], in the units of the targets."""
        found = self.net(self._standard(part.x), part.fraction)[0]
        return found * self.spread + self.middle

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of these logits, in a vector of one."""
        spread, middle = self.spread.cpu(), self.middle.cpu()
        if targets.is_floating_point():
            targets = (targets - middle) / spread
        return self.goal.losses(((logits - middle) / spread).unsqueeze(0), targets)

    def fold(self, step: int | None) -> Any:
        """The MLP on raw rows."""
        means = self.mean.unsqueeze(0), self.scale.unsqueeze(0)
        steps = None if step is None else [step]
        labels = self.goal.task.labels
        return self.net.fold(*means, labels, steps, self.middle, self.spread)[0]


def _shuffle(part: LabelledPart, draw: torch.Generator) -> LabelledPart:
    order = torch.randperm(len(part.x), generator=draw).to(part.targets.device)
    return replace(part, targets=part.targets[order])


def _random(part: LabelledPart, draw: torch.Generator) -> LabelledPart:
    seed = int(torch.randint(2**31, (), generator=draw))
    return replace(part, x=random_rows(part.x, seed))
