import math

import numpy as np
import pytest

from dreamreader.errors import InvalidInput
from dreamreader.stats import bootstrap, ratio_of_means, wilson


def test_agrees_with_the_plain_bootstrap() -> None:
    rng = np.random.default_rng(0)
    below = rng.normal(5, 1, 200)
    above = 0.3 * below + rng.normal(0, 1, 200)
    fast = ratio_of_means([above, 2 * above], below, resamples=4000)
    slow = bootstrap(
        np.stack([above, below], 1), lambda p: float(p[:, 0].sum() / p[:, 1].sum()), resamples=4000
    )
    assert fast[0].value == pytest.approx(slow.value) and fast[0].n == 200
    assert fast[0].low == pytest.approx(slow.low, abs=0.004)
    assert fast[0].high == pytest.approx(slow.high, abs=0.004)
    assert fast[1].high == pytest.approx(2 * fast[0].high)


def test_without_denominators_it_is_the_mean() -> None:
    found = ratio_of_means([[float(i % 10) for i in range(400)]])[0]
    half = 1.96 * 2.872 / 20
    assert found.value == 4.5
    assert abs(found.low - (4.5 - half)) < 0.05 and abs(found.high - (4.5 + half)) < 0.05


def test_a_pair_is_drawn_whole() -> None:
    found = ratio_of_means([[1.0, 2.0, 9.0]], [2.0, 4.0, 18.0])[0]
    assert found.low == found.high == 0.5


def test_nothing_to_restore_is_no_number() -> None:
    found = ratio_of_means([[1.0, 2.0]], [1.0, -1.0])[0]
    assert math.isnan(found.value) and math.isnan(found.low) and found.n == 2


@pytest.mark.parametrize(
    "over, under, text",
    [
        ([1.0], None, r"must be \[lines, n\], got \[1\]"),
        ([[1.0, 2.0]], [1.0], r"2 observations, denominators are \[1\]"),
        ([[float("inf")]], None, "must be finite"),
    ],
)
def test_refuses_what_does_not_fit(over, under, text) -> None:
    with pytest.raises(InvalidInput, match=text):
        ratio_of_means(over, under)


def test_shares_at_the_ends_have_the_bounds_of_counts() -> None:
    whole = [1.0, 2.0, 0.0, 1.0, 1.0]
    lines = [np.zeros(5), whole, [1.0, 0.0, 0.0, 1.0, 1.0]]
    none, every, some = ratio_of_means(lines, whole, within=True)
    assert (none.value, none.low, none.high) == (0.0, 0.0, wilson(0, 4).high)
    assert (every.value, every.low, every.high) == (1.0, wilson(4, 4).low, 1.0)
    assert some == ratio_of_means(lines, whole)[2]
    assert ratio_of_means(lines, whole)[1].low == 1.0
