"""Tiny sparse autoencoders that train from a store, the same in every process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamreader.fitting import History, Recipe, fit
from dreamreader.store import StoreDataset
from dreamreader.store.reference import ReferenceWriter

SITE, WIDTH = "block.attn:heads", 12


class TopK(nn.Module):
    """Keeps the k largest features; counts for how long each was none of them."""

    idle: Tensor
    threshold: Tensor

    def __init__(self, features: int, k: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.k = k
        self.encoder = nn.Parameter(torch.randn(features, WIDTH, generator=generator) / 4)
        self.decoder = nn.Parameter(self.encoder.detach().clone())
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("idle", torch.zeros(features, dtype=torch.int64))
        self.register_buffer("threshold", torch.tensor(-torch.inf))
        normalise(self, 0)

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = F.relu((x - self.bias) @ self.encoder.T).topk(self.k, dim=-1)
        if self.training:
            self.idle += 1
            self.idle[chosen[values > 0].unique()] = 0
            least = values.detach().min()
            self.threshold.copy_(torch.where(self.threshold.isinf(), least, self.threshold))
            self.threshold.lerp_(least, 0.1)
        return (values.unsqueeze(-1) * self.decoder[chosen]).sum(-2) + self.bias


def normalise(sae: nn.Module, done: int) -> None:
    """Directions of the decoder have length 1."""
    assert isinstance(sae, TopK)
    with torch.no_grad():
        sae.decoder /= sae.decoder.norm(dim=1, keepdim=True)


def error(sae: nn.Module, x: Tensor) -> Tensor:
    return (sae(x) - x).square().mean()


def write_store(folder: Path) -> Path:
    from store.conftest import fill

    writer = ReferenceWriter(folder, "0" * 64)
    fill(writer)
    writer.close()
    return folder


def saes() -> dict[str, TopK]:
    return {"small": TopK(16, 2, 0), "large": TopK(24, 3, 1)}


RECIPES = {
    "small": Recipe(epochs=3, lr=0.02, schedule="wsd", warmup=3, optimizer="Adam"),
    "large": Recipe(epochs=3, lr=0.01, schedule="cosine", grad_clip=0.05),
}


def trained(
    store: Path, folder: Path | None = None, names: tuple[str, ...] = ("small", "large"), **kw: Any
) -> tuple[Mapping[str, TopK], dict[str, History]]:
    """Autoencoders after three epochs of 10 batches."""
    torch.set_num_threads(1)
    chosen = {name: each for name, each in saes().items() if name in names}
    rows = StoreDataset(store, SITE, batch_size=29, seed=4)
    recipes = {name: RECIPES[name] for name in chosen}
    given: dict[str, Any] = {"after_step": normalise, "save_every": 4, "folder": folder}
    return chosen, fit(chosen, error, rows, recipes, **given | kw)
