"""Moments of labelled rows: their number, sum and sum of squares by label, in float64."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops._types import FLOATS, NEEDED


class Sums(NamedTuple):
    """What `moments` gives; with a common shift, sums of several calls add up.

    Attributes:
        rows: int64 [labels], how many rows each label has.
        total: float64 [labels, features], sum of x - shift.
        square: float64 [labels, features], sum of (x - shift)^2; [0, features] without squares.
    """

    rows: Int[Tensor, " labels"]
    total: Float[Tensor, "labels features"]
    square: Float[Tensor, "labels features"]


def moments(
    x: Float[Tensor, "rows features"],
    labels: Int[Tensor, " rows"],
    count: int,
    *,
    shift: Float[Tensor, " features"] | None = None,
    squares: bool = True,
) -> Sums:
    """Sums rows and their squares by label in one pass over memory, in float64.

    Formula: total[l] = sum_{i: labels[i] = l} x[i] - shift; square[l] = sum (x[i] - shift)^2

    Args:
        x: rows of any strides, float32, bfloat16, float16 or float64; no gradient flows here.
        labels: int64, 0 .. count - 1; rows with a negative label take no part.
        count: number of labels.
        shift: float64, a point near the rows (any of them will do): it keeps the squares exact
            where the mean is large beside the spread. 0 by default.
        squares: whether to sum squares too.

    Returns:
        Sums by label, new tensors on the device of x.

    Raises:
        InvalidInput: x is not [rows, features] of floating point, a label is `count` or above, or
            labels or shift have another shape, dtype or device.

    Example:
        >>> import torch
        >>> found = moments(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), 2)
        >>> found.rows.tolist(), found.total.tolist(), found.square.tolist()
        ([2, 1], [[3.0], [5.0]], [[5.0], [25.0]])

    Reference:
        Shifted data: Chan, Golub and LeVeque, Algorithms for computing the sample variance (1983).
    """
    if x.dim() != 2 or x.dtype not in FLOATS:
        wanted = f"floating point [rows, features] of {NEEDED}"
        raise InvalidInput(f"moments: x must be {wanted}, got {_describe(x)}")
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise InvalidInput(f"moments: labels must be int64 [{len(x)}], got {_describe(labels)}")
    if labels.device != x.device:
        raise InvalidInput(f"moments: x is on {x.device}, labels on {labels.device}")
    if count < 0:
        raise InvalidInput(f"moments: {count} labels are announced, 0 or more are possible")
    if shift is None:
        shift = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    elif shift.dtype != torch.float64 or shift.shape != x.shape[1:] or shift.device != x.device:
        wanted = f"float64 [{x.shape[1]}] on {x.device}"
        raise InvalidInput(
            f"moments: shift must be {wanted}, got {_describe(shift)} on {shift.device}"
        )
    return Sums(*_moments(x.detach(), labels, shift.contiguous(), count, squares))


def moments_reference(
    x: Tensor, labels: Tensor, shift: Tensor, count: int, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `moments` in plain torch, on any device.

    Args:
        x: [N, D]. labels: int64 [N]. shift: float64 [D].
        count: number of labels L.
        squares: whether the third result is [L, D] or [0, D].

    Returns:
        int64 [L], float64 [L, D], float64 [L or 0, D].
    """
    _check_values(labels, count)
    seen, total, square = _empty(x, count, squares)
    for label in range(count):
        rows = x[labels == label].double() - shift  # [n, D]
        seen[label] = len(rows)
        total[label] = rows.sum(0)
        if squares:
            square[label] = rows.square().sum(0)
    return seen, total, square


def _cpu(
    x: Tensor, labels: Tensor, shift: Tensor, count: int, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.shape[1]:
        return moments_reference(x, labels, shift, count, squares)
    _check_values(labels, count)
    seen, total, square = _empty(x, count, squares)
    _native.moments_cpu(x, labels, shift, seen, total, square, torch.get_num_threads())
    return seen, total, square


def _fake(
    x: Tensor, labels: Tensor, shift: Tensor, count: int, squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, count, squares)


def _empty(x: Tensor, count: int, squares: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide, device = x.shape[1], x.device
    return (
        _alloc.empty((count,), dtype=torch.int64, device=device),
        _alloc.empty((count, wide), dtype=torch.float64, device=device),
        _alloc.empty((count if squares else 0, wide), dtype=torch.float64, device=device),
    )


def _check_values(labels: Tensor, count: int) -> None:
    """Raises InvalidInput for a label beyond the last; in the kernels, as no graph can hold it."""
    if not len(labels):
        return
    # By numpy: torch would wake its threads for this, and wait for them on a busy machine.
    largest = int(labels.numpy().max() if labels.device.type == "cpu" else labels.max())
    if largest >= count:
        raise InvalidInput(f"moments: {count} labels are announced, the largest is {largest}")


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


_native: Any = native()[0]

_moments = register(
    "moments",
    "(Tensor x, Tensor labels, Tensor shift, int count, bool squares) -> (Tensor, Tensor, Tensor)",
    reference=moments_reference,
    fake=_fake,
    cpu=Kernel("moments_cpu", _cpu),
)
