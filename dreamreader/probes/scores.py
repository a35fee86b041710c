"""What probes are worth on rows that they never saw."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.probes.calibration import brier, expected_calibration_error, temperature
from dreamreader.probes.labels import Targets, Task
from dreamreader.stats import Interval, wilson


@dataclass(frozen=True)
class Held:
    """Rows that did not train: logits, targets, numbers of group and of MLP."""

    logits: Float[Tensor, "rows outputs"]
    targets: Targets
    group: Int[Tensor, " rows"]
    slot: Int[Tensor, " rows"]


def temperatures(
    held: Held, task: Task, loss: str, count: int
) -> Float[Tensor, "count attributes"]:
    """A temperature for each MLP and attribute, fitted to these rows; 1 in regression."""
    found = torch.ones(count, len(task.classes))
    if task.kind == "regress":
        return found
    for n in range(count):
        own = held.slot == n
        for a, part in enumerate(task.parts.values()):
            targets = claimed_classes(_of(held.targets[own], a, part, task), part, loss)
            found[n, a] = temperature(held.logits[own][:, part], targets)
    return found


def probabilities(
    logits: Float[Tensor, "*rows outputs"],
    task: Task,
    loss: str,
    temperature: Float[Tensor, "*rows attributes"],
) -> Float[Tensor, "*rows outputs"]:
    """Softmax within each attribute, or the sigmoid of each label, of logits / T."""
    parts = []
    for a, part in enumerate(task.parts.values()):
        scaled = logits[..., part] / temperature[..., a : a + 1].to(logits)
        parts.append(scaled.softmax(-1) if loss == "softmax" else scaled.sigmoid())
    return torch.cat(parts, -1)


def scores(
    held: Held, task: Task, loss: str, temperature: Float[Tensor, "count attributes"]
) -> dict[str, dict[str, Any]]:
    """By attribute: what a probe card tells of its held-out rows.

    classify: `accuracy` with its 95 % interval (groups are the observations), `by_step`, `auroc`
    (mean over classes against the rest), `recall` by class, `confusion` [true, told], `ece` and
    `brier` without and with the temperature. multilabel: the same over labels, no confusion.
    regress: `r2`, `rmse`, by output. The loss `sigmoid` is calibrated label by label.
    """
    if task.kind == "regress":
        return {"": fit_of(held, task)}
    by_row, found = temperature[held.slot], {}  # [rows, attributes]
    for a, (attribute, part) in enumerate(task.parts.items()):
        logits, targets = held.logits[:, part], _of(held.targets, a, part, task)
        names = task.classes[attribute]
        only, own = Task(task.kind, {attribute: names}), by_row[:, a : a + 1]
        tables = [probabilities(logits, only, loss, t) for t in (torch.ones_like(own), own)]
        right, claims = _right(logits, targets), claimed_classes(targets, part, loss)
        found[attribute] = {
            "accuracy": interval(right, held.group).as_dict(),
            "by_step": [float(right[held.slot == n].mean()) for n in range(len(temperature))],
            "auroc": auroc(tables[0], targets),
            "ece": [expected_calibration_error(each, claims) for each in tables],
            "brier": [brier(each, claims) for each in tables],
            **_classes(logits, targets, names),
        }
    return found


def fit_of(held: Held, task: Task) -> dict[str, Any]:
    """R^2 and root mean squared error of each output of a regression."""
    error = (held.logits - held.targets).square().mean(0)
    spread = held.targets.var(0, correction=0)
    names = task.labels
    r2 = [1 - float(e / s) if s > 0 else None for e, s in zip(error, spread, strict=True)]
    return {
        "r2": dict(zip(names, r2, strict=True)),
        "rmse": dict(zip(names, error.sqrt().tolist(), strict=True)),
    }


def score_attributes(held: Held, task: Task, loss: str) -> dict[str, dict[str, Any]]:
    """By attribute: accuracy and AUROC as `scores` has them, or what is told of a regression."""
    if task.kind == "regress":
        return {"": fit_of(held, task)}
    found = {}
    for a, (attribute, part) in enumerate(task.parts.items()):
        logits, targets = held.logits[:, part], _of(held.targets, a, part, task)
        accuracy = interval(_right(logits, targets), held.group).as_dict()
        only = Task(task.kind, {attribute: task.classes[attribute]})
        predicted = probabilities(logits, only, loss, torch.ones(1))
        found[attribute] = {"accuracy": accuracy, "auroc": auroc(predicted, targets)}
    return found


def interval(right: Float[Tensor, " rows"], group: Int[Tensor, " rows"]) -> Interval:
    """The mean with a Wilson interval for as many observations as there are groups.

    Rows of one prompt, and steps of one row, are no observations of their own.
    """
    value, groups = float(right.mean()), len(group.unique())
    return replace(wilson(round(value * groups), groups), value=value)


def auroc(
    scored: Float[Tensor, "rows classes"],
    targets: Int[Tensor, " rows"] | Float[Tensor, "rows classes"],
) -> float | None:
    """Mean over classes of the chance that a row of the class scores above another; ties half.

    None where no class has rows on both sides.
    """
    flags = targets if targets.dim() == 2 else torch.nn.functional.one_hot(targets, scored.shape[1])
    found = []
    for each, on in zip(scored.double().T, flags.bool().T, strict=True):
        above, below = each[on], each[~on].sort().values
        if len(above) and len(below):
            low = torch.searchsorted(below, above, side="left")
            high = torch.searchsorted(below, above, side="right")
            found.append(float((low + high).double().mean()) / (2 * len(below)))
    return sum(found) / len(found) if found else None


def claimed_classes(targets: Tensor, part: slice, loss: str) -> Tensor:
    """What the probabilities of an attribute speak of: its class, or each label on its own.

    Sigmoids need not add up to 1: each says how sure its own label is, also of classes.
    """
    if loss != "sigmoid" or targets.dim() == 2:
        return targets
    return torch.nn.functional.one_hot(targets, part.stop - part.start).double()


def _right(logits: Tensor, targets: Tensor) -> Float[Tensor, " rows"]:
    if targets.dim() == 2:
        return ((logits > 0) == (targets > 0)).double().mean(-1)
    return (logits.argmax(-1) == targets).double()


def _of(targets: Targets, number: int, part: slice, task: Task) -> Tensor:
    return targets[:, number] if task.kind == "classify" else targets[:, part]


def _classes(logits: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
    if targets.dim() == 2:
        predicted = logits > 0
        shares = [predicted[targets[:, n] > 0, n].double() for n in range(len(names))]
        return {"recall": _shares(names, shares)}
    predicted, count = logits.argmax(-1), len(names)
    table = torch.bincount(targets * count + predicted, minlength=count * count).reshape(
        count, count
    )
    shares = [(predicted[targets == n] == n).double() for n in range(count)]
    return {"recall": _shares(names, shares), "confusion": table.tolist()}


def _shares(names: Sequence[str], right: Sequence[Tensor]) -> dict[str, float | None]:
    """None where no row of the class was held out."""
    pairs = zip(names, right, strict=True)
    return {name: float(each.mean()) if len(each) else None for name, each in pairs}
