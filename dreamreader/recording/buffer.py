"""Rows of activations of several sites, in memory or, where they are many, in a file."""

import os
import tempfile
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dreamreader.engine import Cache
from dreamreader.errors import InvalidInput

MEMORY = 4 << 30


class ActivationBuffer:
    """Rows of several sites, in memory or, where they are many, in a file.

    Args:
        count: rows. memory: bytes above which they go to a file without a name, in bfloat16.
        width: tokens of a row, where rows have different numbers: then they begin with their first
            and end with zeros.

    Attributes:
        values: by site, [rows, tokens, features]. grids: by site, the grid of its tokens.
        counts: by site, [rows] own tokens of each row, where there is a width.
    """

    def __init__(self, count: int, memory: int, width: int | None = None):
        self.count = count
        self.memory = memory
        self.width = width
        self.values: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.grids: dict[str, tuple[int, int] | None] = {}

    def put(self, rows: Tensor, cache: Cache) -> None:
        """Keeps what was recorded of some rows, at one step.

        Raises:
            InvalidInput: rows have different numbers of tokens, and there is no width.
        """
        found = {site: _plain(each.tensor, each.heads) for site, each in cache.items()}
        if self.width is not None:
            for site, each in cache.items():
                found[site] = self._align(site, found[site], each.positions)
                counts = self.counts.setdefault(site, torch.zeros(self.count, dtype=torch.int64))
                assert each.positions is not None
                counts[rows] = (each.positions[:, 0] >= 0).sum(1)
        self.grids.update({site: each.hw for site, each in cache.items()})
        self.store(rows, found)

    def store(self, rows: Tensor, found: Mapping[str, Tensor]) -> None:
        """Keeps values of some rows, by site [rows, tokens, features]."""
        if not self.values:
            bytes_ = sum(each[0].numel() * each.element_size() for each in found.values())
            make = _in_file if 2 * bytes_ * self.count > self.memory else torch.empty
            self.values = {site: _allocate(make, self.count, each) for site, each in found.items()}
        for site, value in found.items():
            if value.shape[1:] != self.values[site].shape[1:]:
                raise InvalidInput(
                    f"{site}: has {list(value.shape[1:])} values, before "
                    f"{list(self.values[site].shape[1:])}: the prompts have different numbers of "
                    "tokens; choose as many of each with tokens="
                )
            self.values[site][rows] = value.to(self.values[site].dtype)

    def _align(self, site: str, values: Tensor, positions: Tensor | None) -> Tensor:
        """[rows, width, features] with each token at its own index, without padding."""
        assert self.width is not None
        if positions is None or values.dim() != 3 or int(positions.max()) >= self.width:
            raise InvalidInput(
                f"{site}: which tokens of prompts of different length belong together is unknown; "
                "choose as many of each with tokens="
            )
        own = positions[:, 0]
        out = values.new_zeros(len(values), self.width, values.shape[2])
        row, column = (own >= 0).nonzero(as_tuple=True)
        out[row, own[row, column]] = values[row, column]
        return out


def _allocate(make: Callable[..., Tensor], count: int, like: Tensor) -> Tensor:
    return make((count, *like.shape[1:]), dtype=like.dtype)


def _in_file(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name: its space is free again when the tensor is gone."""
    size = torch.Size(shape).numel()
    handle, path = tempfile.mkstemp(suffix=".activations")
    os.close(handle)
    try:
        flat = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
    finally:
        os.unlink(path)
    return flat.reshape(shape)


def _plain(tensor: Tensor, heads: int | None) -> Tensor:
    """[rows, tokens, features] of a recording with one step."""
    flat = tensor.flatten(-2) if heads else tensor
    return flat.squeeze(1)
