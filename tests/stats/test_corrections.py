import numpy as np
import pytest

from dreamreader.errors import InvalidInput
from dreamreader.stats import benjamini_hochberg, holm

# Benjamini and Hochberg (1995), section 3: 15 p-values; at 0.05 their procedure rejects the four
# smallest, Bonferroni-type procedures the three smallest.
P = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240]
P += [0.4262, 0.5719, 0.6528, 0.7590, 1.0]


def test_the_published_example() -> None:
    assert (benjamini_hochberg(P) <= 0.05).sum() == 4
    assert (holm(P) <= 0.05).sum() == 3


def test_values_by_hand_in_any_order() -> None:
    np.testing.assert_allclose(benjamini_hochberg([0.04, 0.01, 0.03]), [0.04, 0.03, 0.04])
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(benjamini_hochberg([0.5, 0.5]), [0.5, 0.5])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])


def test_a_test_that_was_not_made_does_not_count() -> None:
    found = holm([0.01, float("nan"), 0.03])
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], [0.02, 0.03])
    assert benjamini_hochberg([]).tolist() == []


@pytest.mark.parametrize("method", [benjamini_hochberg, holm])
def test_refuses_what_is_no_probability(method) -> None:
    with pytest.raises(InvalidInput, match="lies between 0 and 1, got 1.5"):
        method([0.1, 1.5])
    with pytest.raises(InvalidInput, match=r"must be \[m\], got \[1, 1\]"):
        method([[0.1]])
