"""The positive entries above a threshold, one for all columns or one for each."""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops._arguments import check_count, check_tensor
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

TRITON = "dreamreader.triton_kernels.threshold_select"
_FIRST = 128  # entries of a row for which there is room at first


def threshold_select(
    x: Float[Tensor, "rows width"],
    threshold: Float[Tensor, "*width"],
    slots: int | None = None,
) -> SparseRows:
    """Keeps the positive entries above a threshold.

    Formula: S = {(i, j): relu(x[i, j]) > max(threshold[j], 0)}, compared in float32 (in float64
        where x is), and every NaN. Nothing is above a NaN.

    Args:
        x: activations before or after relu, float32, bfloat16, float16 or float64.
        threshold: float32, [] for all columns or [width].
        slots: how many entries there is room for. By default there is room for all of them, which
            takes a second pass where they are many, and waits for a GPU.

    Returns:
        The entries. With `slots` too few for them `row_ptr` counts them all the same, but columns
        are all -1 and values 0. The gradient of the values goes to the entries that were kept.

    Raises:
        InvalidInput: x is not [rows, width] of floating point, threshold is not float32, [] or
            [width] on the device of x, or slots is negative.

    Example:
        >>> import torch
        >>> codes = threshold_select(torch.tensor([[1.0, 3.0, 2.0, -3.0]]), torch.tensor(1.0))
        >>> codes.row_ptr.tolist(), codes.columns[:2].tolist(), codes.values[:2].tolist()
        ([0, 2], [1, 2], [3.0, 2.0])

    Reference:
        Rajamanoharan et al., Jumping ahead: improving reconstruction fidelity with JumpReLU sparse
        autoencoders (2024), equation 4.
    """
    check_matrix("threshold_select", x)
    check_threshold("threshold_select", threshold, x, x.shape[1])
    if slots is not None:
        check_count("threshold_select", "slots", slots)
    room = x.shape[0] * min(_FIRST, x.shape[1]) if slots is None else slots
    found = _threshold_select(x, threshold, room)
    if slots is None and (needed := int(found[1][-1])) > room:
        found = _threshold_select(x, threshold, needed)
    return sparse_rows(found, x.shape[1])


def check_threshold(name: str, threshold: Tensor, x: Tensor, width: int) -> None:
    """Raises InvalidInput unless `threshold` is float32, [] or [width], beside x."""
    check_tensor(name, "the threshold", threshold, f"float32 [] or [{width}] on {x.device}")
    right = threshold.dtype == torch.float32 and list(threshold.shape) in ([], [width])
    if not right or threshold.device != x.device:
        got = f"{str(threshold.dtype).removeprefix('torch.')} {list(threshold.shape)}"
        raise InvalidInput(
            f"{name}: the threshold must be float32 [] or [{width}] on {x.device}, got {got} on "
            f"{threshold.device}"
        )


def threshold_select_reference(x: Tensor, threshold: Tensor, slots: int) -> Rows:
    """The definition of `threshold_select` in plain torch, on any device.

    Args:
        x: [n, F].
        threshold: float32 [] or [F].
        slots: how many entries there is room for.

    Returns:
        [slots], int64 [n + 1], int32 [slots]; where there are more entries than slots, -1 and 0.
    """
    keys = eligible(x)
    mask = keys.isnan() | (keys > 0) & (keys.double() > threshold.double())
    return rows_of_mask(keys, mask, slots)


def _cpu(x: Tensor, threshold: Tensor, slots: int) -> Rows:
    found = empty_rows(x, slots)
    _native.threshold_select_cpu(
        dense_rows(x), threshold.contiguous(), *found, torch.get_num_threads()
    )
    return found


def _triton(x: Tensor, threshold: Tensor, slots: int) -> Rows:
    kernel = import_module(TRITON)
    if not kernel.supported(x):
        return threshold_select_reference(x, threshold, slots)
    if not x.numel():
        return no_entries(x, slots)
    found = empty_rows(x, slots)
    kernel.threshold_select(dense_rows(x), threshold.contiguous(), *found)
    return found


def _fake(x: Tensor, threshold: Tensor, slots: int) -> Rows:
    return empty_rows(x, slots)


_native: Any = native()[0]

_threshold_select = register(
    "threshold_select",
    "(Tensor x, Tensor threshold, int slots) -> (Tensor, Tensor, Tensor)",
    reference=threshold_select_reference,
    fake=_fake,
    cpu=Kernel("threshold_select_cpu", _cpu),
    triton=Kernel(TRITON, _triton),
    setup_context=setup_context,
    backward=backward,
    twice=backward,
)
