from itertools import product

import numpy as np
import pytest

from dreamreader.errors import InvalidInput
from dreamreader.stats import sign_flip


def by_hand(differences: list[float]) -> float:
    seen = abs(sum(differences))
    signs = list(product([1, -1], repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(row, differences, strict=True))) for row in signs]
    return sum(each >= seen - 1e-9 for each in sums) / len(signs)


@pytest.mark.parametrize(
    "differences", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [0.0, 0.0], [0.1, 0.2, -0.3, 0.7, 0.7]]
)
def test_few_pairs_give_the_exact_share_of_sign_patterns(differences: list[float]) -> None:
    assert float(sign_flip(differences)) == by_hand(differences)


def test_ties_by_rounding_count_as_ties() -> None:
    # 0.1 + 0.2 + 0.3 in every order and sign pattern +++ and --- only
    assert float(sign_flip([0.3, 0.1, 0.2])) == 0.25
    assert float(sign_flip([0.1, 0.2, -0.3])) == 1.0


def test_many_pairs_are_drawn_and_near_the_exact_value() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 16)
    exact = float(sign_flip(values, resamples=2**16))
    drawn = float(sign_flip(values, resamples=20_000))
    assert 0.01 < exact < 0.9 and abs(drawn - exact) < 0.015
    assert float(sign_flip(values, resamples=20_000)) == drawn
    assert float(sign_flip(np.ones(40), resamples=999)) == 1 / 1000


def test_tests_share_a_call_and_not_their_result() -> None:
    rows = [[1.0, 2.0, 3.0, 4.0], [1.0, -2.0, 3.0, -4.0]]
    assert sign_flip(rows).tolist() == [float(sign_flip(row)) for row in rows]


def test_p_values_are_uniform_where_nothing_happens() -> None:
    found = sign_flip(np.random.default_rng(2).normal(size=(2000, 10)))
    for level in (0.1, 0.5):
        assert abs((found <= level).mean() - level) < 0.03


@pytest.mark.parametrize(
    "values, text",
    [([], r"must be \[n\] or \[tests, n\], got \[0\]"), ([1.0, float("nan")], "1 values are not")],
)
def test_refuses_nothing_and_nan(values: list[float], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        sign_flip(values)
