import numpy as np
import pytest

from dreamreader.errors import InvalidInput
from dreamreader.stats.variation import variation_to_uniform


@pytest.mark.parametrize(
    "found, names, value",
    [
        ("aabb", "ab", 0.0),
        ("aaab", "ab", 0.25),  # (|3/4 - 1/2| + |1/4 - 1/2|) / 2
        ("aaaa", "abcd", 0.75),
        ("aabbcd", "abcd", 1 / 6),  # (2/12 + 2/12) / 2, each 1/3 - 1/4 or 1/6 - 1/4
        ("aabx", "ab", 0.25),  # b lacks a quarter, x has one
        ("xyxy", "ab", 1.0),
        ("aabb", "aabb", 0.0),  # names count once
    ],
    ids=["even", "one more", "one only", "two more", "one other", "others only", "names twice"],
)
def test_values_by_hand(found: str, names: str, value: float) -> None:
    assert variation_to_uniform(found, names).value == pytest.approx(value)


def test_the_interval_is_that_of_redrawn_samples() -> None:
    """70 of 100 are a: the share has a standard error of 0.0458, and so has its variation."""
    found = variation_to_uniform("a" * 70 + "b" * 30, "ab")
    assert found.value == pytest.approx(0.2) and found.n == 100
    assert found.low == pytest.approx(0.2 - 1.96 * 0.0458, abs=0.02)
    assert found.high == pytest.approx(0.2 + 1.96 * 0.0458, abs=0.02)
    assert variation_to_uniform("a" * 70 + "b" * 30, "ab") == found
    wide = variation_to_uniform("a" * 7 + "b" * 3, "ab")
    assert wide.high - wide.low > 2 * (found.high - found.low)


def test_even_draws_have_the_variation_that_the_formula_says() -> None:
    draw = np.random.default_rng(0)
    names = list(range(8))
    values = [
        variation_to_uniform(draw.integers(0, 8, 96).tolist(), names).value for _ in range(150)
    ]
    assert np.mean(values) == pytest.approx((7 / (2 * np.pi * 96)) ** 0.5, rel=0.06)


def test_bounds_err_upwards() -> None:
    """An even sample lies below its own interval: a resample is less even."""
    found = variation_to_uniform("abcd" * 20, "abcd")
    assert found.value == 0 < found.low < found.high < 0.2


def test_other_names_need_no_kind() -> None:
    assert variation_to_uniform([None, 1, "1"], [1, None]).value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "found, names, text", [("", "ab", "0 observations of 2"), ("a", "", "1 observations of 0")]
)
def test_nothing_has_no_variation(found: str, names: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        variation_to_uniform(found, names)
