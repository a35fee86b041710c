"""Confidence intervals: Wilson's for shares, percentile bootstrap for means and ratios."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dreamreader.errors import InvalidInput


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and upper confidence bound, from `n` observations."""

    value: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        """The estimate and its bounds as percentages, e.g. `92 % (86 to 96)`."""
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(hits: int | Sequence[bool], n: int | None = None, confidence: float = 0.95) -> Interval:
    """Gives a share of successes with its Wilson score interval.

    `centre = (p + z^2/2n) / (1 + z^2/n)`, half width `z/(1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2)`.
    Unlike the usual normal interval it stays within [0, 1] and does not collapse at 0 or n of n.

    Args:
        hits: the number of successes, or one truth value per observation.
        n: number of observations; only with a number of successes.
        confidence: coverage, between 0 and 1.

    Returns:
        The share `hits / n` and its bounds; with n = 0, 0.0 with bounds 0 and 1.

    Raises:
        InvalidInput: when hits is not between 0 and n, or the confidence not between 0 and 1.

    Reference:
        Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if not isinstance(hits, int):
        outcomes = [bool(hit) for hit in hits]
        hits, n = sum(outcomes), len(outcomes)
    if n is None or not 0 <= hits <= n:
        raise InvalidInput(f"wilson: {hits} successes of {n} observations")
    z = NormalDist().inv_cdf(0.5 + _check(confidence) / 2)
    if n == 0:
        return Interval(0.0, 0.0, 1.0, 0)
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == n else min(1.0, centre + half)
    return Interval(share, low, high, n)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Gives a statistic of the rows of an array with its percentile bootstrap interval.

    Args:
        values: observations along the first axis; rows are drawn whole, so pairs stay pairs.
        statistic: from an array of observations to a number; the mean when None.
        confidence: coverage, between 0 and 1.
        resamples: how many times the rows are drawn with replacement.
        seed: of the draws; equal inputs give equal bounds.

    Returns:
        The statistic of the data and the percentiles of the resampled statistics.

    Raises:
        InvalidInput: when there are no observations, or one is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim == 0 or len(data) == 0:
        raise InvalidInput("bootstrap: no observations")
    if not np.isfinite(data).all():
        raise InvalidInput(f"bootstrap: {int((~np.isfinite(data)).sum())} values are not finite")
    measure = statistic or (lambda rows: float(rows.mean()))
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(data), size=(resamples, len(data)))
    found = np.array([measure(data[rows]) for rows in draws])
    tail = (1 - _check(confidence)) / 2
    low, high = np.nanquantile(found, [tail, 1 - tail])
    return Interval(float(measure(data)), float(low), float(high), len(data))


def _check(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence
