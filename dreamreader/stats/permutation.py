"""Permutation tests: how often chance alone gives differences as large as those seen."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dreamreader.errors import InvalidInput


def sign_flip(
    differences: ArrayLike, resamples: int = 10_000, seed: int = 0
) -> NDArray[np.float64] | np.float64:
    """Gives the two-sided p-value of paired differences, by flipping their signs.

    `p = share of sign patterns s with |sum_i s_i d_i| >= |sum_i d_i|`. All 2^n patterns are taken
    where they are no more than `resamples`, and the test is exact; else that many are drawn and
    `p = (1 + hits) / (1 + resamples)`. Under the null hypothesis each difference is as likely as
    its negative. With n pairs no p-value is below 2^(1 - n).

    Args:
        differences: [n] or [tests, n], one value for each pair; tests share the patterns.
        resamples: most patterns that are tried.
        seed: of the draws; equal inputs give equal p-values.

    Returns:
        p-values [] or [tests].

    Raises:
        InvalidInput: there are no pairs, or a value is not finite.

    Example:
        >>> float(sign_flip([1.0, 2.0, 3.0]))
        0.25

    Reference:
        Fisher (1935), The design of experiments, section 21.
    """
    data = np.asarray(differences, dtype=np.float64)
    if data.ndim not in (1, 2) or data.size == 0:
        raise InvalidInput(
            f"sign_flip: differences must be [n] or [tests, n], got {list(data.shape)}"
        )
    if not np.isfinite(data).all():
        raise InvalidInput(f"sign_flip: {int((~np.isfinite(data)).sum())} values are not finite")
    tests = np.atleast_2d(data)
    count = tests.shape[1]
    exact = count < 60 and 2**count <= resamples
    if exact:
        patterns = np.arange(2**count)[:, None] >> np.arange(count)
        signs = 1.0 - 2.0 * (patterns & 1)  # [2^n, n]
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, count))
    seen = np.abs(tests.sum(1))
    # Sums of the same numbers in another order differ in the last bits: that is a tie.
    slack = 1e-12 * np.abs(tests).sum(1)
    hits = (np.abs(signs @ tests.T) >= seen - slack).sum(0)
    found = hits / len(signs) if exact else (1 + hits) / (1 + len(signs))
    return found if data.ndim == 2 else found[0]
