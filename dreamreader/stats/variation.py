"""How far a sample of names is from an even distribution."""

from collections.abc import Hashable, Sequence

import numpy as np

from dreamreader.errors import InvalidInput
from dreamreader.stats.intervals import Interval, bootstrap


def variation_to_uniform(found: Sequence[Hashable], names: Sequence[Hashable]) -> Interval:
    """Total variation between a sample and the uniform distribution, with its bootstrap interval.

    Formula: TV = 1/2 sum_k |n_k / n - 1 / K|, plus half the share of what is none of the names.

    Args:
        found: one name for each observation. names: the K names of the uniform distribution.

    Returns:
        A number from 0 (even) to 1, and its percentile bootstrap interval. An even draw of n has
        about `sqrt((K - 1) / (2 pi n))`, so that a value near it says nothing against evenness;
        for the same reason a resample is less even than the sample, and the bounds err upwards.

    Raises:
        InvalidInput: there are no observations, or no names.

    Example:
        >>> variation_to_uniform(["a", "a", "b", "b"], ["a", "b"]).value
        0.0
    """
    if not names or not found:
        raise InvalidInput(f"variation: {len(found)} observations of {len(names)} names")
    places = {name: number for number, name in enumerate(dict.fromkeys(names))}
    numbers = np.array([places.get(each, len(places)) for each in found])
    even = np.append(np.full(len(places), 1 / len(places)), 0.0)

    def distance(rows: np.ndarray) -> float:
        counts = np.bincount(rows.astype(np.int64), minlength=len(even))
        return float(np.abs(counts / len(rows) - even).sum() / 2)

    return bootstrap(numbers, distance, resamples=1000)
