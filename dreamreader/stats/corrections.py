"""Corrections of p-values for many tests at once."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dreamreader.errors import InvalidInput


def benjamini_hochberg(p_values: ArrayLike) -> NDArray[np.float64]:
    """Gives q-values: rejecting q <= a keeps the expected share of false findings below a.

    `q_(i) = min over j >= i of p_(j) m / j`, for the m p-values in rising order; at most 1. Holds
    for independent and for positively dependent tests. NaN (no test) stays NaN and is not counted.

    Raises:
        InvalidInput: a value is no probability, or they are not [m].

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.04, 0.04]

    Reference:
        Benjamini and Hochberg (1995), Controlling the false discovery rate.
    """

    def steps(p: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = p * len(p) / np.arange(1, len(p) + 1)
        return np.minimum.accumulate(scaled[::-1])[::-1]

    return _adjust("benjamini_hochberg", p_values, steps)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Gives adjusted p-values: rejecting those <= a keeps the chance of any false finding below a.

    `p~_(i) = max over j <= i of (m - j + 1) p_(j)`, for the m p-values in rising order; at most 1.
    Holds whatever the dependence of the tests. NaN (no test) stays NaN and is not counted.

    Raises:
        InvalidInput: a value is no probability, or they are not [m].

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]

    Reference:
        Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    return _adjust("holm", p_values, lambda p: np.maximum.accumulate(p * np.arange(len(p), 0, -1)))


def _adjust(label: str, p_values: ArrayLike, rule) -> NDArray[np.float64]:
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1:
        raise InvalidInput(f"{label}: p-values must be [m], got {list(given.shape)}")
    tested = ~np.isnan(given)
    p = given[tested]
    wrong = p[(p < 0) | (p > 1)]
    if len(wrong):
        raise InvalidInput(f"{label}: a p-value lies between 0 and 1, got {wrong[0]:g}")
    order = np.argsort(p, kind="stable")
    found = np.full(given.shape, np.nan)
    if len(p):
        back = np.empty_like(p)
        back[order] = np.minimum(rule(p[order]), 1.0)
        found[tested] = back
    return found
