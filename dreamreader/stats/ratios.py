"""Ratios of means with bootstrap intervals, for many numerators over the same observations."""

import numpy as np
from numpy.typing import ArrayLike

from dreamreader.errors import InvalidInput
from dreamreader.stats.intervals import Interval, _check, wilson


def ratio_of_means(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    within: bool = False,
) -> list[Interval]:
    """Gives `sum_i a_i / sum_i b_i` of each line of numerators, with percentile bootstrap bounds.

    Observations are drawn whole, so a_i stays with its b_i, and all lines see the same draws. A
    ratio of means, not a mean of ratios: an observation with b_i near 0 does not blow it up.

    Args:
        numerators: [lines, n].
        denominators: [n], of all lines; 1 when None, which gives plain means.
        confidence: coverage, between 0 and 1.
        resamples: how many times the observations are drawn with replacement.
        seed: of the draws; equal inputs give equal bounds.
        within: whether a_i is a part of b_i, as counts of successes are. Where all of them are
            nothing, or the whole, the bootstrap has no width, and the bounds are Wilson's over the
            observations whose b_i is not 0.

    Returns:
        One interval for each line; NaN where the denominators add up to 0.

    Raises:
        InvalidInput: shapes do not fit, there are no observations, or a value is not finite.

    Example:
        >>> ratio_of_means([[1.0, 2.0, 3.0]], [2.0, 4.0, 6.0])[0].value
        0.5
    """
    over = np.asarray(numerators, dtype=np.float64)
    if over.ndim != 2 or over.shape[1] == 0:
        raise InvalidInput(f"ratio_of_means: numerators must be [lines, n], got {list(over.shape)}")
    lines, count = over.shape
    under = np.ones(count) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if under.shape != (count,):
        raise InvalidInput(
            f"ratio_of_means: {count} observations, denominators are {list(under.shape)}"
        )
    if not (np.isfinite(over).all() and np.isfinite(under).all()):
        raise InvalidInput("ratio_of_means: values must be finite")
    tail = (1 - _check(confidence)) / 2
    whole = float(under.sum())
    if whole == 0:
        nan = float("nan")
        return [Interval(nan, nan, nan, count)] * lines
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    below = draws @ under  # [resamples]
    draws, below = draws[below != 0], below[below != 0]
    found = (draws @ over.T) / below[:, None]  # [resamples, lines]
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    values = over.sum(1) / whole
    intervals = [
        Interval(float(v), float(a), float(b), count)
        for v, a, b in zip(values, low, high, strict=True)
    ]
    if not within:
        return intervals
    known = int(np.count_nonzero(under))
    return [_at_ends(each, known, confidence) for each in intervals]


def _at_ends(found: Interval, known: int, confidence: float) -> Interval:
    """Wilson's bounds where every observation was 0, or every one was the whole."""
    if found.low != found.high or found.value not in (0.0, 1.0):
        return found
    bounds = wilson(known if found.value else 0, known, confidence)
    return Interval(found.value, bounds.low, bounds.high, found.n)
