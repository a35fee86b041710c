"""Rank correlations: whether two measurements put the same things in the same order."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dreamreader.errors import InvalidInput


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Gives each value its rank from 1, equal values the mean of theirs.

    Example:
        >>> ranks([30.0, 10.0, 30.0]).tolist()
        [2.5, 1.0, 2.5]
    """
    data = np.asarray(values, dtype=np.float64)
    _, group, count = np.unique(data, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[group]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Gives Spearman's rank correlation: Pearson's r of the ranks, ties at their mean rank.

    Returns:
        -1 (opposite order) to 1 (same order); NaN where one side has only equal values.

    Raises:
        InvalidInput: lengths differ, there are fewer than 2 values, or one is not finite.

    Example:
        >>> spearman([1, 2, 3], [10, 30, 20])
        0.5
    """
    x, y = (ranks(side) for side in _pair("spearman", a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else float("nan")


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Gives Kendall's tau-b: pairs in the same order less pairs in the opposite one.

    `tau = (C - D) / sqrt((P - Ta)(P - Tb))`, of P pairs C agree, D disagree, Ta and Tb are tied on
    one side.

    Returns:
        -1 to 1; NaN where one side has only equal values.

    Raises:
        InvalidInput: lengths differ, there are fewer than 2 values, or one is not finite.

    Example:
        >>> round(kendall([1, 2, 3], [10, 30, 20]), 4)
        0.3333
    """
    x, y = _pair("kendall", a, b)
    first, second = np.triu_indices(len(x), 1)
    dx, dy = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
    scale = np.sqrt(np.abs(dx).sum() * np.abs(dy).sum())
    return float(dx @ dy / scale) if scale else float("nan")


def _pair(label: str, a: ArrayLike, b: ArrayLike) -> tuple[NDArray, NDArray]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise InvalidInput(
            f"{label}: two lists of the same length of at least 2 are needed, got "
            f"{list(x.shape)} and {list(y.shape)}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InvalidInput(f"{label}: values must be finite")
    return x, y
