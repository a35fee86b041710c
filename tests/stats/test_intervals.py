import pytest

from dreamreader.errors import InvalidInput
from dreamreader.stats import Interval, bootstrap, wilson


def test_wilson_matches_published_values():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148.
    found = wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    found = wilson(15, 148)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0624, 0.1605)


def test_wilson_stays_within_the_unit_interval_at_the_ends():
    none, all_of_them = wilson(0, 20), wilson([True] * 20)
    assert none.low == 0 and 0.1 < none.high < 0.2
    assert all_of_them.high == 1 and 0.8 < all_of_them.low < 0.9
    assert wilson([]) == Interval(0.0, 0.0, 1.0, 0)


@pytest.mark.parametrize(
    "hits, n, text", [(5, 4, "5 successes of 4"), (-1, 4, "-1 successes"), (3, None, "of None")]
)
def test_wilson_refuses_impossible_counts(hits, n, text):
    with pytest.raises(InvalidInput, match=text):
        wilson(hits, n)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = [float(i % 10) for i in range(400)]
    found = bootstrap(values)
    assert found.value == 4.5 and found.n == 400
    half = 1.96 * 2.872 / 20
    assert abs(found.low - (4.5 - half)) < 0.05 and abs(found.high - (4.5 + half)) < 0.05
    assert bootstrap(values) == found


def test_bootstrap_keeps_paired_columns_paired():
    pairs = [(float(i), 2.0 * i) for i in range(1, 30)]
    found = bootstrap(pairs, lambda rows: float(rows[:, 1].sum() / rows[:, 0].sum()))
    assert found.low == pytest.approx(2.0) and found.high == pytest.approx(2.0)


def test_bootstrap_refuses_nothing_and_nan():
    with pytest.raises(InvalidInput, match="no observations"):
        bootstrap([])
    with pytest.raises(InvalidInput, match="1 values are not finite"):
        bootstrap([1.0, float("nan")])
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        bootstrap([1.0], confidence=95)


def test_percent_reads_as_a_sentence():
    assert Interval(0.92, 0.86, 0.961, 100).percent() == "92 % (86 to 96)"
