"""Labelled rows whose best probe is known, and recordings made by hand."""

import torch
from torch import Tensor

from dreamreader.engine import Activation, Row
from dreamreader.engine._clock_schedule import StepInfo

SITE = "unet.mid_block.attentions.0"


def blobs(
    rows: int = 150, features: int = 8, classes: int = 3, apart: float = 6.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows around one centre for each class, far from 0, and the numbers of their classes."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    x = torch.randn(rows, features, generator=g)
    x[torch.arange(rows), y] += apart
    return 4.0 * x + 30.0, y


def activation(
    values: Tensor, prompts: list[str] | None = None, branches: tuple[str, ...] = ("cond",)
) -> Activation:
    """An activation of [rows, (branch,) steps, tokens, features]."""
    steps = values.shape[2 if len(branches) > 1 else 1]
    moments = tuple(StepInfo(n, 999.0 - n, 1.0, n / steps, 0) for n in range(steps))
    rows = tuple(Row(n, prompts[n] if prompts else None) for n in range(len(values)))
    return Activation(SITE, values, rows, branches, moments)


def shifting(rows: int = 200, steps: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[rows, steps, 2] whose boundary moves with the step: class 1 lies above 4 step."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % 2
    x = torch.randn(rows, steps, 2, generator=g)
    x[..., 0] += 4.0 * torch.arange(steps) + (3.0 * (2 * y - 1))[:, None]
    return x, y


def padded(rows: int) -> tuple[Activation, list[Tensor]]:
    """A recorded text whose rows have 2 to 4 tokens, padded in front, and each row's tokens."""
    x, y = blobs(4 * rows)
    x = x[y.argsort(stable=True)].reshape(3, -1, 8)  # by class
    lengths = [2 + n // 3 % 3 for n in range(rows)]
    each = [x[n % 3, 4 * (n // 3) :][:length] for n, length in enumerate(lengths)]
    values = torch.full((rows, 1, 4, 8), torch.nan)
    own = torch.full((rows, 1, 4), -1)
    for row, tokens in enumerate(each):
        values[row, 0, 4 - len(tokens) :] = tokens
        own[row, 0, 4 - len(tokens) :] = torch.arange(len(tokens))
    moments = (StepInfo(0, float("nan"), None, float("nan"), 0),)
    numbered = tuple(Row(n) for n in range(rows))
    found = Activation("model.layers.1", values, numbered, ("cond",), moments, positions=own)
    return found, each
