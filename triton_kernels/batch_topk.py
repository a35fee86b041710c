"""The largest positive entries of all rows together in Triton: see `_candidates`."""

from dreamreader.triton_kernels._candidates import Candidates, guess
from dreamreader.triton_kernels._selection import FORMS, block_of
from torch import Tensor

MARGIN = 1.1  # candidates beyond K that are wanted


def supported(x: Tensor) -> bool:
    """Whether the kernels take a call: not float64."""
    return x.dtype in FORMS


def batch_topk(
    x: Tensor,
    count: int,
    pool: Tensor | None,
    values: Tensor,
    row_ptr: Tensor,
    columns: Tensor,
    threshold: Tensor,
) -> None:
    """Writes the entries; rows of x are dense, there are `count` slots, and at least one."""
    rows, width = x.shape[0], x.shape[1] if pool is None else len(pool)
    rank, room = guess(count, rows * width, MARGIN)
    found = Candidates(x, rows, width, block_of(width), room, count)
    found.guess(x, rank, pool)
    found.append(x, 0, pool)
    found.write(x, pool, values, row_ptr, columns, threshold)
