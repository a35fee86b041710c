import math

import pytest

from dreamreader.errors import InvalidInput
from dreamreader.stats import kendall, ranks, spearman


def test_ties_share_their_mean_rank() -> None:
    assert ranks([5.0, 1.0, 5.0, 5.0, 0.0]).tolist() == [4.0, 2.0, 4.0, 4.0, 1.0]


def test_spearman_without_ties_is_the_formula_of_squared_differences() -> None:
    a, b = [86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12]
    squared = ((ranks(a) - ranks(b)) ** 2).sum()
    assert squared == 194
    assert spearman(a, b) == pytest.approx(1 - 6 * 194 / (10 * 99))


def test_spearman_with_ties_by_hand() -> None:
    # ranks 1.5 1.5 3 and 1 2.5 2.5, centred -.5 -.5 1 and -1 .5 .5: .75 / 1.5
    assert spearman([1, 1, 2], [1, 2, 2]) == pytest.approx(0.5)


def test_kendall_by_hand() -> None:
    # pairs of (1 2 3 4) and (1 3 2 4): 5 agree, 1 disagrees
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    # tied: (a, b) only in the first, (b, c) only in the second, (a, c) agrees: 1 / sqrt(2 * 2)
    assert kendall([1, 1, 2], [1, 2, 2]) == pytest.approx(0.5)


@pytest.mark.parametrize("measure", [spearman, kendall])
def test_order_is_all_that_counts(measure) -> None:
    a = [0.1, 5.0, -2.0, 3.0]
    assert measure(a, [math.exp(each) for each in a]) == pytest.approx(1)
    assert measure(a, [-each for each in a]) == pytest.approx(-1)
    assert math.isnan(measure(a, [1, 1, 1, 1]))


@pytest.mark.parametrize("measure", [spearman, kendall])
def test_refuses_unequal_lengths_and_nan(measure) -> None:
    with pytest.raises(InvalidInput, match=r"same length of at least 2 .* got \[2\] and \[3\]"):
        measure([1, 2], [1, 2, 3])
    with pytest.raises(InvalidInput, match="same length of at least 2"):
        measure([1], [1])
    with pytest.raises(InvalidInput, match="must be finite"):
        measure([1, float("nan")], [1, 2])
