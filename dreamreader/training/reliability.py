"""Reliability: how often a probe is right where it is so and so sure."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.probes import Probe
from dreamreader.probes.labels import Targets, encode_labels
from dreamreader.probes.scores import claimed_classes

BINS = 10

Predictions = tuple[Float[Tensor, "rows outputs"], Targets]
"""Calibrated probabilities of held-out rows, and their targets."""

Bins = dict[str, list[tuple[float, float, int]]]
"""By attribute: mean confidence, accuracy and rows of each bin that has some."""


def targets_of(probe: Probe, labels: Any) -> Targets:
    """Labels as numbers of the probe's classes, or flags."""
    task = probe.task
    single = task.classes.get("") if list(task.classes) == [""] else task.classes
    return encode_labels(labels, task.kind, None if task.kind == "regress" else single)[1]


def reliability(probe: Probe, held: Iterable[Predictions]) -> Bins:
    """Bins of held-out rows; none of a regression."""
    if probe.task.kind == "regress":
        return {}
    sums: dict[str, Tensor] = {}
    for probabilities, targets in held:
        for number, (attribute, part) in enumerate(probe.task.parts.items()):
            own = probabilities[:, part]
            flags = probe.task.kind == "multilabel"
            right_ones = targets[:, part] if flags else targets[:, number]
            right_ones = claimed_classes(right_ones, part, probe.loss)
            table = sums.setdefault(attribute, torch.zeros(3, BINS, dtype=torch.float64))
            _add(table, own, right_ones)
    return {
        attribute: [
            (float(sure / n), float(right / n), int(n)) for sure, right, n in table.T if n > 0
        ]
        for attribute, table in sums.items()
    }


def _add(table: Float[Tensor, "3 bins"], probabilities: Tensor, targets: Tensor) -> None:
    p = probabilities.double().cpu()
    if targets.dim() == 2:
        sure, right = torch.maximum(p, 1 - p).flatten(), ((p >= 0.5) == (targets > 0)).flatten()
    else:
        sure, right = p.max(-1).values, p.argmax(-1) == targets
    place = (sure * BINS).long().clamp(max=BINS - 1)
    for line, value in zip(table, (sure, right.double(), torch.ones_like(sure)), strict=True):
        line.index_add_(0, place, value)
