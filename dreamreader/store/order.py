"""Which positions of an epoch belong to which batch of which rank."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchOrder:
    """Rounds in which every rank gets a batch, from a position of the epoch on.

    Attributes:
        rows: of an epoch, of all ranks. batch_size: rows of a batch.
        rank, world: whose batches, and how many ranks there are.
        drop_last: leaves out what does not fill a batch of every rank; else it is shared out
            evenly, so that the ranks have the same number of batches as long as there are rows.
    """

    rows: int
    batch_size: int
    rank: int
    world: int
    drop_last: bool

    @property
    def round(self) -> int:
        """Rows of a round of full batches."""
        return self.batch_size * self.world

    def after(self, start: int, rounds: int) -> int:
        """The position after so many rounds."""
        return min(start + rounds * self.round, self.rows)

    def batches(self, start: int) -> int:
        """How many batches the rank has."""
        full, rest = divmod(self.rows - start, self.round)
        return full + (not self.drop_last and self._share(rest)[1] > 0)

    def batch(self, start: int, number: int) -> tuple[int, int]:
        """First position of a batch of the rank, and its rows."""
        full, rest = divmod(self.rows - start, self.round)
        first = start + number * self.round
        if number < full:
            return first + self.rank * self.batch_size, self.batch_size
        before, rows = self._share(rest)
        return first + before, rows

    def _share(self, rest: int) -> tuple[int, int]:
        """How many of the rows of the last round are before those of the rank, and its own."""
        before = rest * self.rank // self.world
        return before, rest * (self.rank + 1) // self.world - before


def seed_of(seed: int, epoch: int) -> int:
    """The seed of the permutation of an epoch, 64 bits, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
