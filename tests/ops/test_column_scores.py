"""Properties of the scores of columns, against numpy, and what must be refused."""

import numpy as np
import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.ops import column_scores
from tests.cases._matrices import matrix

A = matrix("normal", (200, 30), torch.float32)
POSITIVE = np.maximum(A.double().numpy(), 0)


def test_norms_are_those_of_numpy():
    wanted = np.linalg.norm(POSITIVE, axis=0)
    np.testing.assert_allclose(column_scores(A, "l2"), wanted, rtol=1e-6)
    np.testing.assert_allclose(column_scores(A, "l2_squared"), wanted**2, rtol=1e-6)


def test_entropy_is_that_of_the_shares_of_the_rows():
    p = POSITIVE / POSITIVE.sum(0)
    wanted = -(p * np.log(np.where(p > 0, p, 1))).sum(0)
    np.testing.assert_allclose(column_scores(A, "entropy"), wanted, rtol=1e-6)
    np.testing.assert_allclose(column_scores(A, "entropy_low"), 1 / (1 + wanted), rtol=1e-6)


def test_entropy_of_equal_rows_is_the_logarithm_of_their_number():
    x = torch.zeros(64, 2)
    x[:16, 0], x[3, 1] = 2.5, 7.0
    assert column_scores(x, "entropy").tolist() == pytest.approx([np.log(16), 0.0], abs=1e-6)


def test_leverage_is_the_diagonal_of_the_ridge_projection():
    inverse = np.linalg.inv(POSITIVE @ POSITIVE.T + 0.01 * np.eye(200))
    wanted = np.einsum("if,ij,jf->f", POSITIVE, inverse, POSITIVE)
    np.testing.assert_allclose(column_scores(A, "leverage"), wanted, rtol=1e-5)
    assert column_scores(torch.tensor([[torch.nan, 1.0]]), "leverage").isnan().all()


def test_columns_without_a_positive_entry():
    x = torch.tensor([[-1.0, 2.0], [0.0, 1.0]])
    for score in ("l2", "l2_squared", "entropy", "entropy_low", "leverage"):
        assert column_scores(x, score)[0] == 0
    assert column_scores(x, "uniform").tolist() == [1.0, 1.0]


def test_no_gradient_flows():
    assert not column_scores(A.clone().requires_grad_(), "l2").requires_grad


def test_wrong_inputs_say_what_is_wrong():
    with pytest.raises(InvalidInput, match="score must be one of l2, .*, uniform, got l1"):
        column_scores(A, "l1")
    with pytest.raises(InvalidInput, match=r"column_scores: x must be .* got int64 \[3\]"):
        column_scores(torch.arange(3), "l2")
