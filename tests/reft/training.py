"""A small training on made-up activations, the same in every process."""

from pathlib import Path
from typing import Any

import torch

from dreamreader.reft import ActivationMatch, History, Pairs, Reft, train

WIDTHS = {"a": 12, "b": 8}


def made_up(rows: int = 12, calls: int = 2) -> Pairs:
    """Activations whose teacher is an affine function of the base, with a little noise."""
    generator = torch.Generator().manual_seed(3)
    base, teacher = {}, {}
    for site, width in WIDTHS.items():
        h = torch.randn(rows, calls, 4, width, generator=generator)
        turn = torch.randn(width, 2, generator=generator)
        push = 0.5 * torch.randn(2, width, generator=generator)
        noise = 0.1 * torch.randn(h.shape, generator=generator)
        base[site], teacher[site] = h, h + (h @ turn + 1) @ push + noise
    return Pairs(base, teacher, tuple(range(calls)))


def trained(folder: Path | None = None, **kw: Any) -> tuple[Reft, History]:
    torch.set_num_threads(1)
    reft = Reft(WIDTHS, 2, steps=2)
    given: dict[str, Any] = {
        "steps": 40,
        "lr": 0.02,
        "batch_size": 5,
        "validation": 0.25,
        "validate_every": 5,
        "warmup": 4,
        "grad_clip": 1.0,
        "save_every": 7,
    }
    return reft, train(reft, ActivationMatch(made_up()), folder=folder, **given | kw)
