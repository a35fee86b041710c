"""Seeded weights for the tiny models: random everywhere, zero nowhere."""

import zlib
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def settle(module: Module, name: str) -> Module:
    """Draw every weight again from a stream that depends only on `name`.

    Matrices get a standard deviation of 1/sqrt(fan in), gains 1 ± 0.1, biases 0.1. A layer that
    starts at zero (the gates of AdaLN-zero, an output projection) would make the model blind to
    its prompt, its timestep or its position.
    """
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for path, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=rng)
        if weight.ndim >= 2:
            weight.copy_(noise / weight[0].numel() ** 0.5)
        elif path.endswith("weight"):
            weight.copy_(1 + 0.1 * noise)
        else:
            weight.copy_(0.1 * noise)
    return module.eval().requires_grad_(False)
