"""Fitting probes to recordings that are at hand."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import Recipe
from dreamreader.probes.card import Card
from dreamreader.probes.controls import controls as measured_controls
from dreamreader.probes.labels import Targets, encode_labels
from dreamreader.probes.objective import ProbeObjective, check_counts, count_rows, objective
from dreamreader.probes.probe import Probe
from dreamreader.probes.rows import ProbeRows, Recorded, rows_of
from dreamreader.probes.scores import scores, temperatures
from dreamreader.probes.split import HELD_OUT, TRAIN, VALIDATION, deal_groups, number_groups
from dreamreader.probes.train import (
    Design,
    Problem,
    TrainedMlps,
    describe_training,
    recipe_of,
    train,
)

PER_STEP = ("each", "shared", "noise")
PARTS = {"train": TRAIN, "validation": VALIDATION, "held_out": HELD_OUT}


def fit(
    recorded: Recorded,
    labels: Any,
    *,
    task: str = "classify",
    classes: Any = None,
    hidden: Sequence[int] = (128, 128),
    activation: str = "relu",
    per_step: str = "each",
    pool: str = "mean",
    loss: str = "softmax",
    class_weights: str | Mapping[str, float] | None = None,
    epochs: int = 200,
    patience: int = 10,
    lr: float = 1e-3,
    batch_size: int = 64,
    jitter: float = 0.0,
    holdout: int = 5,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    controls: bool = True,
    subject: str | None = None,
) -> Probe:
    """Trains a probe to tell labels or numbers from the activations of one site.

    Args:
        recorded: an activation, a cache with one site, or a tensor [rows, features], [rows, steps,
            features] or [rows, steps, tokens, features], whose fractions are step / steps.
        labels: a class for each row (names, or numbers), or a mapping from attributes to such: one
            probe then tells them all, with labels such as `color=blue`. multilabel: the set of
            labels of each row, or flags [rows, labels]. regress: a number for each row, or a
            mapping.
        task: `classify`, `multilabel` or `regress`.
        classes: names of the classes in their order (by attribute where there are several), which
            numbers index; by default those that occur, sorted.
        hidden: widths of none (a linear probe) to two hidden layers.
        activation: between layers, `relu`, `gelu` or `silu`.
        per_step: `each` step has a probe of its own, one is `shared` by all, or one is
            conditioned on the share of the trajectory done (`noise`).
        pool: `mean` over tokens, every `token` as a row with its row's label, or all side by side
            (`flat`).
        loss: `softmax`, cross-entropy within each attribute, or `sigmoid`, binary cross-entropy of
            each label.
        class_weights: None, `balanced`, or numbers by label.
        epochs: at most so many passes; patience: it stops after so many without a better validated
            state.
        lr: of Adam. batch_size: rows in a step.
        jitter: noise on the inputs in training, the same in all directions, as a multiple of their
            root mean square deviation. A probe that is to guide needs about 1: the gradient of one
            that only reads clean rows points to where no activations are.
        holdout: one group of so many validates (it chooses the state that is kept, and the
            temperature), and one is held out and only measures.
        groups: rows that belong together and are never split; by default rows of one prompt, where
            prompts are known.
        seed: of the split, the start and the order.
        controls: whether controls are trained as well: shuffled labels, random features, another
            capacity.
        subject: name of the model, for the card.

    Returns:
        A probe on raw activations, with its card.

    Raises:
        UnknownName: of a task, pool, loss, label or other choice.
        InvalidInput: labels that do not fit the rows, one class only, values that are not finite,
            several sites or branches, or nothing held out.

    Example:
        >>> rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> probe = fit(rows, (rows[:, 0] > 0).long(), hidden=(), classes=("left", "right"), lr=0.1)
        >>> probe.predict(torch.tensor([[2.0, 0, 0, 0], [-2.0, 0, 0, 0]]))
        ['right', 'left']

    Reference:
        Alain and Bengio, Understanding intermediate layers using linear classifier probes (2016).
    """
    if per_step not in PER_STEP:
        raise UnknownName("per_step of a probe", per_step, PER_STEP)
    design = Design(tuple(hidden), activation, jitter)
    recipe = recipe_of(epochs, patience, lr, batch_size, seed)
    rows = rows_of(recorded, pool)
    labelled, targets = encode_labels(labels, task, classes, len(rows.values))
    belonging = rows.prompts if groups is None and rows.prompts is not None else groups
    count = len(rows.values)
    group = number_groups(range(count) if belonging is None else belonging, count)
    part = deal_groups(group, targets, holdout, seed)
    counts = count_rows(labelled, targets[part == TRAIN])
    check_counts(labelled, counts)
    goal = objective(labelled, loss, class_weights, counts)
    problem = _problem(rows, targets, part, group, per_step, goal, design, recipe)
    trained = train(problem)
    known = {
        "subject": subject,
        "site": rows.site,
        "branch": rows.branch,
        "steps": list(rows.steps),
        "pool": pool,
        "per_step": per_step,
        "rows": {name: int((part == each).sum()) for name, each in PARTS.items()},
        "groups": {name: len(group[part == each].unique()) for name, each in PARTS.items()},
        "counts": dict(zip(labelled.labels, counts.tolist(), strict=False)),
        "training": {**describe_training(design, recipe), "loss": goal.loss, "holdout": holdout},
        "controls": measured_controls(problem, trained) if controls else {},
    }
    return assemble_probe(goal, trained, known)


def _problem(
    rows: ProbeRows,
    targets: Targets,
    part: Tensor,
    group: Tensor,
    per_step: str,
    goal: ProbeObjective,
    design: Design,
    recipe: Recipe,
) -> Problem:
    """Rows of each step side by side, or of all steps one below the other; tokens as rows.

    Padding is left out.
    """
    values, real = rows.values.detach(), rows.each  # [rows, steps, tokens, features]
    _, steps, tokens, _ = values.shape
    device = values.device
    apart = per_step == "each" and bool(rows.steps)
    if apart:
        if not bool((real == real[:, :1]).all()):
            raise InvalidInput(
                f"{rows.site}: padding is at other tokens from step to step; record one token of "
                "each, or fit with per_step='shared'"
            )
        x, repeats, kept = values.transpose(0, 1).flatten(1, 2), tokens, real[:, 0].flatten()
        fraction = torch.zeros(x.shape[1], device=device)
    else:
        x, repeats, kept = values.flatten(0, 2).unsqueeze(0), steps * tokens, real.flatten()
        fraction = torch.tensor(rows.fractions, device=device).repeat_interleave(tokens)
        fraction = fraction.repeat(len(values))
    targets, part, group = (
        each.to(device).repeat_interleave(repeats, 0) for each in (targets, part, group)
    )
    if rows.real is not None:
        x, fraction = x[:, kept], fraction[kept]
        targets, part, group = targets[kept], part[kept], group[kept]
    noisy = per_step == "noise"
    own = rows.steps if apart else None
    return Problem(x, targets, fraction, part, group, goal, noisy, design, recipe, own)


def assemble_probe(goal: ProbeObjective, trained: TrainedMlps, known: Mapping[str, Any]) -> Probe:
    """The probe of what was trained, calibrated by its validation rows, with its card.

    Args:
        known: what the card tells beside the task and what is measured here.
    """
    labelled = goal.task
    temperature = temperatures(trained.validation, labelled, goal.loss, len(trained.mlps))
    card = Card(
        task=labelled.kind,
        classes={attribute: list(names) for attribute, names in labelled.classes.items()},
        class_weights=dict(zip(labelled.labels, goal.weights.tolist(), strict=True)),
        epochs=list(trained.epochs),
        held_out=scores(trained.held_out, labelled, goal.loss, temperature),
        **known,
    )
    return Probe(
        trained.mlps, labelled, goal.loss, temperature, card.site, card.branch, card.pool, card
    )
