"""A batch of rows with where they are from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.store.shard import open_shard


class Batch(NamedTuple):
    """Rows and where they are from, int32 each.

    Attributes:
        values: the rows. unit: number of the unit. sample: line of the unit's samples.
        step: when they were taken. branch: place in `StoreDataset.branches`.
        token: of the row, -1 where it was pooled over tokens.
    """

    values: Float[Tensor, "rows width"]
    unit: Int[Tensor, " rows"]
    sample: Int[Tensor, " rows"]
    step: Int[Tensor, " rows"]
    branch: Int[Tensor, " rows"]
    token: Int[Tensor, " rows"]


class Names:
    """What the numbers in the keys of several shards stand for; reads the header of each.

    Args:
        files: of one site, in the folders of their units.
    """

    def __init__(self, files: list[str]):
        shards = [open_shard(Path(name)) for name in files]
        self.branches = tuple(dict.fromkeys(name for each in shards for name in each.branches))
        self._units = torch.tensor([int(each.path.parent.name) for each in shards]).int()
        self._steps = _table([each.moments[:, 0] for each in shards])
        self._branches = _table(
            [np.array([self.branches.index(name) for name in each.branches]) for each in shards]
        )

    def batch(
        self, values: Float[Tensor, "rows width"], keys: Int[Tensor, "rows columns"]
    ) -> Batch:
        """Rows with their coordinates.

        Args:
            keys: columns `gather.FOUND`.
        """
        file, sample, moment, branch, token = keys.unbind(1)
        return Batch(
            values,
            self._units[file],
            sample.contiguous(),
            self._steps[file, moment],
            self._branches[file, branch],
            token.contiguous(),
        )


def _table(lines: list[np.ndarray]) -> Int[Tensor, "files most"]:
    """Lines of different lengths, filled up with -1."""
    table = np.full((len(lines), max(map(len, lines), default=0)), -1, np.int32)
    for number, line in enumerate(lines):
        table[number, : len(line)] = line
    return torch.from_numpy(table)
