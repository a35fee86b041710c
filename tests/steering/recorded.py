"""Recordings made by hand, and labelled Gaussian rows whose best direction is known."""

import torch
from torch import Tensor

from dreamreader.engine import Activation, Row
from dreamreader.engine._clock_schedule import StepInfo

SITE = "unet.mid_block.attentions.0"


def activation(
    tensor: Tensor, branches: tuple[str, ...] = ("cond",), steps: tuple[int, ...] | None = None
) -> Activation:
    """An activation of [rows, (branch,) steps, tokens, features] or with heads."""
    axis = 2 if len(branches) > 1 else 1
    numbers = tuple(range(tensor.shape[axis])) if steps is None else steps
    moments = tuple(StepInfo(i, 999.0 - i, 1.0, i / 10, 0) for i in numbers)
    rows = tuple(Row(i) for i in range(tensor.shape[0]))
    heads = tensor.shape[-2] if tensor.ndim - len(branches) + 1 > 4 else None
    return Activation(SITE, tensor, rows, branches, moments, heads=heads)


def gaussian(
    rows: int, features: int, seed: int = 0, apart: float = 1.0
) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Two labels with one covariance: rows, labels, difference of the means, covariance."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=g, dtype=torch.float64) / features**0.5
    mix += torch.diag(torch.linspace(0.3, 2.0, features, dtype=torch.float64))
    delta = torch.randn(features, generator=g, dtype=torch.float64) * apart
    noise = torch.randn(rows, features, generator=g, dtype=torch.float64) @ mix.T
    target = torch.arange(rows) % 2 == 1
    labels = ["blue" if each else "red" for each in target.tolist()]
    return noise + target[:, None] * delta + 3.0, labels, delta, mix @ mix.T


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
