"""Which examples come at which step, as a function of the seed alone."""

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.reft.losses import Batch, Loss
from dreamreader.reft.model import Reft

_SEED = 1_000_003


class Batches:
    """The batches of a training: `batches[step]`.

    Every row and call comes once before any comes again; an epoch may end inside a batch.

    Args:
        loss: has the rows and calls. size: of a batch.
        validation: share of rows, at least one of them if not 0, that never come.
        seed: of everything.

    Raises:
        InvalidInput: no row is left for training.
    """

    def __init__(self, loss: Loss, size: int, validation: float, seed: int):
        self.loss, self.size, self.seed = loss, size, seed
        held = max(1, round(validation * loss.rows)) if validation else 0
        if held >= loss.rows:
            raise InvalidInput(
                f"train: validation takes {held} of {loss.rows} rows, none is left to train on"
            )
        order = torch.randperm(loss.rows, generator=torch.Generator().manual_seed(seed))
        self.held, self.rows = order[:held].sort().values, order[held:].sort().values
        self._epoch: tuple[int, Tensor] = (-1, order)

    def __getitem__(self, step: int) -> Batch:
        count = len(self.rows) * self.loss.moments
        places = range(step * self.size, (step + 1) * self.size)
        chosen = torch.stack([self._order(place // count)[place % count] for place in places])
        rows, moments = chosen // self.loss.moments, chosen % self.loss.moments
        return Batch(self.rows[rows], moments, self.seed * _SEED + step)

    @torch.no_grad()
    def validation(self, reft: Reft) -> float:
        """Mean loss over all held-out rows and calls; the same draws each time."""
        count = len(self.held) * self.loss.moments
        total = 0.0
        for number, chosen in enumerate(torch.arange(count).split(self.size)):
            rows, moments = chosen // self.loss.moments, chosen % self.loss.moments
            batch = Batch(self.held[rows], moments, -1 - number)
            total += len(chosen) * float(sum(self.loss.terms(reft, batch).values()))
        return total / count

    def _order(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * _SEED + 7 * epoch + 1)
            count = len(self.rows) * self.loss.moments
            self._epoch = (epoch, torch.randperm(count, generator=generator))
        return self._epoch[1]
