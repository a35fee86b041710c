"""The largest positive entries of all rows together."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops._arguments import check_count, check_tensor
from dreamreader.ops._selection import backward as _backward
from dreamreader.ops._selection import (
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

TRITON = "dreamreader.triton_kernels.batch_topk"
Found = tuple[Tensor, Tensor, Tensor, Tensor]  # values, threshold, row_ptr, columns


def batch_topk(
    x: Float[Tensor, "rows width"], count: int, pool: Int[Tensor, " columns"] | None = None
) -> SparseRows:
    """Keeps the `count` largest positive entries of all rows, with equal ones from the first row.

    Formula: S = the first `count` pairs (i, j) by descending relu(x[i, j]), then by ascending
        i * width + j; entries that are not positive are left out, NaN counts as the largest.

    Args:
        x: activations before or after relu, float32, bfloat16, float16 or float64; compared in
            their own dtype.
        count: entries in all, 0 or more: for k a row, k * rows.
        pool: int32, ascending: the columns that take part. All by default.

    Returns:
        min(count, rows * columns) slots, and the smallest value that was kept as threshold (0 where
        fewer than `count` entries are positive: then all of them are kept). The gradient of the
        values goes to the entries that were kept; none goes through the threshold.

    Raises:
        InvalidInput: x is not [rows, width] of floating point, count is no whole number of 0 or
            more, or the pool is not int32 [columns] on the device of x, ascending and below the
            width.

    Example:
        >>> import torch
        >>> codes = batch_topk(torch.tensor([[1.0, 3.0, 2.0], [0.5, 4.0, -2.0]]), 3)
        >>> codes.row_ptr.tolist(), codes.columns.tolist(), float(codes.threshold)
        ([0, 2, 3], [1, 2, 1], 2.0)

    Reference:
        Bussmann, Leask and Nanda, BatchTopK sparse autoencoders (2024), equation 3.
    """
    check_matrix("batch_topk", x)
    check_count("batch_topk", "count", count)
    if pool is not None:
        check_pool("batch_topk", pool, x)
    return sparse_rows(_batch_topk(x, count, pool), x.shape[1])


def check_pool(name: str, pool: Tensor, x: Tensor, width: int | None = None) -> None:
    """Raises InvalidInput unless `pool` can be columns of x; those on a GPU are not read."""
    width = x.shape[1] if width is None else width
    wanted = f"int32 [columns] on {x.device}"
    check_tensor(name, "the pool", pool, wanted)
    if pool.dtype != torch.int32 or pool.dim() != 1 or pool.device != x.device:
        got = f"{str(pool.dtype).removeprefix('torch.')} {list(pool.shape)} on {pool.device}"
        raise InvalidInput(f"{name}: the pool must be {wanted}, got {got}")
    if not pool.is_cpu or torch.compiler.is_compiling() or not len(pool):
        return
    if int(pool[0]) < 0 or int(pool[-1]) >= width or not bool((pool.diff() > 0).all()):
        raise InvalidInput(
            f"{name}: the columns of the pool must ascend, from 0 to below {width}; sort them, "
            "as pool.unique() does"
        )


def batch_topk_reference(x: Tensor, count: int, pool: Tensor | None) -> Found:
    """The definition of `batch_topk` in plain torch, on any device.

    Args:
        x: [n, F].
        count: 0 or more.
        pool: int32 [P], ascending, or None.

    Returns:
        [slots], [], int64 [n + 1], int32 [slots] with slots = min(count, n P).
    """
    keys = eligible(x)
    slots = _slots(x, count, pool)
    if pool is not None:
        taking_part = torch.zeros_like(keys[:1], dtype=torch.bool).index_fill(1, pool.long(), True)
        keys = torch.where(taking_part, keys, 0.0)
    flat = keys.reshape(-1)
    largest, order = torch.sort(flat, descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(0, order[:slots], True) & (flat != 0)
    threshold = largest[slots - 1].clone() if 0 < slots == count else keys.new_zeros(())
    values, row_ptr, columns = rows_of_mask(keys, mask.view(keys.shape), slots)
    return values, threshold, row_ptr, columns


def _cpu(x: Tensor, count: int, pool: Tensor | None) -> Found:
    def run(*arguments: Any) -> None:
        _native.batch_topk_cpu(*arguments, torch.get_num_threads())

    return _select(run, x, count, pool)


def _triton(x: Tensor, count: int, pool: Tensor | None) -> Found:
    kernel = import_module(TRITON)
    if not kernel.supported(x):
        return batch_topk_reference(x, count, pool)
    return _select(kernel.batch_topk, x, count, pool)


def _select(run: Callable[..., None], x: Tensor, count: int, pool: Tensor | None) -> Found:
    slots = _slots(x, count, pool)
    threshold = _alloc.empty((), dtype=x.dtype, device=x.device)
    if slots == 0:
        values, row_ptr, columns = no_entries(x, 0)
        return values, threshold.zero_(), row_ptr, columns
    values, row_ptr, columns = empty_rows(x, slots)
    pool = None if pool is None else pool.contiguous()
    run(dense_rows(x), slots, pool, values, row_ptr, columns, threshold)
    return values, threshold if slots == count else threshold.zero_(), row_ptr, columns


def _fake(x: Tensor, count: int, pool: Tensor | None) -> Found:
    values, row_ptr, columns = empty_rows(x, _slots(x, count, pool))
    return values, _alloc.empty((), dtype=x.dtype, device=x.device), row_ptr, columns


def _slots(x: Tensor, count: int, pool: Tensor | None) -> int:
    return min(count, x.shape[0] * (x.shape[1] if pool is None else pool.shape[0]))


_native: Any = native()[0]

_batch_topk = register(
    "batch_topk",
    "(Tensor x, int count, Tensor? pool) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=batch_topk_reference,
    fake=_fake,
    cpu=Kernel("batch_topk_cpu", _cpu),
    triton=Kernel(TRITON, _triton),
    setup_context=setup_context,
    backward=_backward,
    twice=_backward,
)
