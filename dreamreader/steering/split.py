"""Which rows are fitted and which are kept out: fixed by a row's number, whatever the batches."""

import numpy as np
import torch
from jaxtyping import Int

from dreamreader.errors import InvalidInput

HELD_OUT = -1
_FINE = 4096  # rows of a label that go to the halves one by one, at least
# Later rows go there by stretches of 64: memory then holds few labels at a time, which sums faster.
_STRETCH_BITS = 6
_STRETCHES = 1024  # before the pattern repeats, a power of 2
# Numbers of rows are numpy's here: torch would wake its threads for each of these small steps, and
# wait for them on a busy machine.


class RowSplit:
    """Puts one row of every `holdout` aside and deals the others to two halves.

    The n-th source row and the n-th target row get the same place, so pairs stay together and both
    halves have the labels in the same proportion.

    Args:
        holdout: one of so many rows of each label is kept out; 0 keeps none.
        kept: rows of each label that are kept out at most, the first ones.
        seed: of the places within the blocks.
    """

    def __init__(self, holdout: int, kept: int, seed: int):
        if holdout < 0 or holdout == 1:
            raise InvalidInput(f"holdout: 0 or 2 and more are possible, got {holdout}")
        if kept < 0:
            raise InvalidInput(f"kept must not be negative, got {kept}")
        generator = torch.Generator().manual_seed(seed)
        self._first = np.full(max(_FINE, holdout * kept), HELD_OUT)
        out = np.zeros(len(self._first), dtype=bool)
        if holdout and kept:
            places = torch.randint(holdout, (kept,), generator=generator).numpy()
            places[0] = holdout - 1  # a few rows are all fitted
            out[np.arange(kept) * holdout + places] = True
        self._first[~out] = _halves(len(out), generator)[: int((~out).sum())]
        self._later = _halves(_STRETCHES, generator)

    def of(self, numbers: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """The half 0 or 1 of each row, or `HELD_OUT`.

        Args:
            numbers: of the rows within their label (or of their groups), from 0.
        """
        last = len(self._first) - 1
        later = self._later[(numbers >> _STRETCH_BITS) & (_STRETCHES - 1)]
        if len(numbers) and numbers.min() > last:
            return later
        return np.where(numbers <= last, self._first[np.minimum(numbers, last)], later)


def _halves(count: int, generator: torch.Generator) -> Int[np.ndarray, " count"]:
    """Zeros and ones, one of each in every two."""
    first = torch.randint(2, (count // 2 + 1, 1), generator=generator)
    return torch.cat([first, 1 - first], 1).flatten()[:count].numpy()
