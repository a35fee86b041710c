"""The k largest positive entries of each row."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._register import Kernel, native, register
from dreamreader.ops._arguments import check_count
from dreamreader.ops._selection import (
    Rows,
    backward,
    check_matrix,
    dense_rows,
    eligible,
    empty_rows,
    no_entries,
    rows_of_mask,
    setup_context,
    sparse_rows,
)
from dreamreader.ops.sparse_rows import SparseRows

TRITON = "dreamreader.triton_kernels.topk"


def topk(x: Float[Tensor, "rows width"], k: int) -> SparseRows:
    """Keeps the k largest positive entries of each row, with equal ones from the left.

    Formula: S_i = the first k columns of row i by descending relu(x[i, j]), then by ascending j;
        entries that are not positive are left out, NaN counts as the largest.

    Args:
        x: activations before or after relu, float32, bfloat16, float16 or float64; compared in
            their own dtype.
        k: entries for each row, 0 or more; all of a row that has fewer.

    Returns:
        rows * min(k, width) slots; a row with fewer positive entries has all of them. The gradient
        of the values goes to the entries that were kept.

    Raises:
        InvalidInput: x is not [rows, width] of floating point, or k is no whole number or negative.

    Example:
        >>> import torch
        >>> codes = topk(torch.tensor([[1.0, 3.0, 2.0, 3.0], [-1.0, 0.0, 5.0, -2.0]]), 2)
        >>> codes.row_ptr.tolist(), codes.columns.tolist(), codes.values.tolist()
        ([0, 2, 3], [1, 3, 2, -1], [3.0, 3.0, 5.0, 0.0])

    Reference:
        Gao et al., Scaling and evaluating sparse autoencoders (2024), equation 2.
    """
    check_matrix("topk", x)
    check_count("topk", "k", k)
    return sparse_rows(_topk(x, k), x.shape[1])


def topk_reference(x: Tensor, k: int) -> Rows:
    """The definition of `topk` in plain torch, on any device.

    Args:
        x: [n, F].
        k: 0 or more.

    Returns:
        [n min(k, F)], int64 [n + 1], int32 [n min(k, F)].
    """
    keys, k = eligible(x), min(k, x.shape[1])
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :k]
    mask = torch.zeros_like(keys, dtype=torch.bool).scatter(1, order, True) & (keys != 0)
    return rows_of_mask(keys, mask, len(x) * k)


def _cpu(x: Tensor, k: int) -> Rows:
    def run(x: Tensor, k: int, *out: Tensor) -> None:
        _native.topk_cpu(x, k, *out, torch.get_num_threads())

    return _select(run, x, k)


def _triton(x: Tensor, k: int) -> Rows:
    kernel = import_module(TRITON)
    if not kernel.supported(x, min(k, x.shape[1])):
        return topk_reference(x, k)
    return _select(kernel.topk, x, k)


def _select(run: Callable[..., None], x: Tensor, k: int) -> Rows:
    rows, k = x.shape[0], min(k, x.shape[1])
    if rows * k == 0:
        return no_entries(x, 0)
    found = empty_rows(x, rows * k)
    run(dense_rows(x), k, *found)
    return found


def _fake(x: Tensor, k: int) -> Rows:
    return empty_rows(x, x.shape[0] * min(k, x.shape[1]))


_native: Any = native()[0]

_topk = register(
    "topk",
    "(Tensor x, int k) -> (Tensor, Tensor, Tensor)",
    reference=topk_reference,
    fake=_fake,
    cpu=Kernel("topk_cpu", _cpu),
    triton=Kernel(TRITON, _triton),
    setup_context=setup_context,
    backward=backward,
    twice=backward,
)
