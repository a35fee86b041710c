"""Memory for batches, used again when nothing refers to a batch any more."""

import weakref
from collections import deque

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_LINE = 64  # bytes; rows that begin at a multiple are written faster
_KEPT = 8  # buffers that wait to be used again


class Buffers:
    """Gives tensors [rows, width] whose memory comes back when the last view of them is gone.

    New memory of the system costs a page fault for each 4 KB, which is slower than reading rows.

    Args:
        rows: of the largest batch.
        pinned: memory that a GPU reads by itself; torch keeps such memory and uses it again.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, pinned: bool = False):
        self.rows, self.width, self.dtype, self.pinned = rows, width, dtype, pinned
        self._free: deque[np.ndarray] = deque(maxlen=_KEPT)

    def take(self, rows: int) -> Float[Tensor, "rows width"]:
        """A tensor with unspecified values."""
        if self.pinned:
            return torch.empty(rows, self.width, dtype=self.dtype, pin_memory=True)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self.rows * self.width * self.dtype.itemsize + _LINE, np.uint8)
        at = -memory.ctypes.data % _LINE
        view = memory[at : at + rows * self.width * self.dtype.itemsize]
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view).view(self.dtype).view(rows, self.width)
