"""What guidance of latents climbs: a probe's log-probability, or the difference of its logits."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dreamreader.edits.labels import coefficients, label_sets
from dreamreader.errors import InvalidInput
from dreamreader.probes.probe import Probe

OBJECTIVES = ("probability", "logits")


def label_targets(
    probe: Probe, target: object, avoid: object
) -> tuple[Float[Tensor, "rows outputs"], Float[Tensor, "rows outputs"]]:
    """Which labels rows are to reach and to leave, 0 or 1; one row where all have the same.

    Raises:
        UnknownName, InvalidInput: a label that the probe has not, or one on both sides; no label
            for a row, or target and avoid for different numbers of rows.
    """
    sides: list[Sequence[tuple]] = [label_sets(each) for each in (target, avoid)]
    count = max(map(len, sides))
    if any(len(each) not in (1, count) for each in sides):
        raise InvalidInput(
            f"latent_guidance: target is for {len(sides[0])} rows, avoid for {len(sides[1])}"
        )
    sides = [list(each) * (count // len(each)) for each in sides]
    c = coefficients(sides[0], sides[1], probe.labels, len(probe.labels))
    for row, each in enumerate(c):
        if not bool(each.any()):
            raise InvalidInput(f"latent_guidance: row {row} has neither target nor avoid")
    return (c < 0).float(), (c > 0).float()


def objective_values(
    probe: Probe,
    step: int,
    logits: Float[Tensor, "rows *tokens outputs"],
    reach: Float[Tensor, "rows outputs"],
    leave: Float[Tensor, "rows outputs"],
    objective: str,
) -> Float[Tensor, " rows"]:
    """The value of each row; over tokens, where they are told one by one, the mean.

    `logits`: mean of the logits to reach less the mean of those to leave. `probability`: the log
    of the (calibrated) probability that, in every attribute that is asked for, one of the labels
    to reach is the case, or none of those to leave.
    """
    reach, leave = (_spread(each.to(logits), logits) for each in (reach, leave))
    if objective == "logits":
        value = _mean(logits, reach) - _mean(logits, leave)
    else:
        value = _log_probability(probe, step, logits, reach > 0, leave > 0)
    return value if value.dim() == 1 else value.flatten(1).mean(1)


def _log_probability(
    probe: Probe, step: int, logits: Tensor, reach: Tensor, leave: Tensor
) -> Tensor:
    temperature, total = probe.temperature_at(step).to(logits), 0.0
    for a, part in enumerate(probe.task.parts.values()):
        z, to, away = logits[..., part] / temperature[a], reach[..., part], leave[..., part]
        if probe.loss == "sigmoid":
            each = torch.where(to, F.logsigmoid(z), 0) + torch.where(away, F.logsigmoid(-z), 0)
            total = total + each.sum(-1)
            continue
        allowed = torch.where(to.any(-1, keepdim=True), to, ~away)  # all, where nothing is asked
        own = z.masked_fill(~allowed, -torch.inf)
        total = total + own.logsumexp(-1) - z.logsumexp(-1)
    assert isinstance(total, Tensor)
    return total


def _mean(logits: Tensor, chosen: Tensor) -> Tensor:
    return (logits * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)


def _spread(chosen: Tensor, logits: Tensor) -> Tensor:
    """[rows, outputs] with an axis for tokens, where the logits have one."""
    return chosen.reshape(len(chosen), *[1] * (logits.dim() - 2), -1).expand(logits.shape)
