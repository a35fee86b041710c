"""Pairs against all permutations and against the proof that their prices are."""

import itertools

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.sae.matching import cosines, mean_correlation, pair, uniqueness


def best_sum(worth: torch.Tensor) -> float:
    wide = worth if worth.shape[0] <= worth.shape[1] else worth.T
    ways = itertools.permutations(range(wide.shape[1]), wide.shape[0])
    return max(float(sum(wide[row, column] for row, column in enumerate(way))) for way in ways)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 6), (6, 3), (5, 5), (4, 7)])
@pytest.mark.parametrize("kind", ["normal", "whole", "equal"])
def test_the_sum_of_the_pairs_is_the_largest_of_all(shape, kind):
    for seed in range(4):
        worth = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        worth = {"normal": worth, "whole": worth.round(), "equal": torch.ones(shape)}[kind]
        pairs = pair(worth)
        assert len(pairs.rows) == len(pairs.columns) == min(shape)
        assert len(pairs.rows.unique()) == len(pairs.columns.unique()) == min(shape)
        assert pairs.rows.tolist() == sorted(pairs.rows.tolist())
        got = float(worth[pairs.rows, pairs.columns].sum())
        assert got == pytest.approx(best_sum(worth), abs=1e-5)


@pytest.mark.parametrize("crowded", [False, True])
def test_prices_prove_it_where_permutations_are_too_many(crowded):
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(120, 300, generator=generator)
    if crowded:  # all rows want the same columns
        worth = torch.randn(300, generator=generator) * 3 + 0.1 * worth
    pairs = pair(worth)
    slack = pairs.row_prices[:, None] + pairs.column_prices - worth
    assert float(slack.min()) > -1e-5
    assert float(slack[pairs.rows, pairs.columns].abs().max()) < 1e-5
    alone = torch.ones(300, dtype=torch.bool)
    alone[pairs.columns] = False
    assert float(pairs.column_prices[alone].abs().max()) == 0
    assert float(pairs.column_prices.min()) >= 0


def test_pairs_of_nothing_and_of_what_is_no_table():
    assert pair(torch.zeros(0, 3)).rows.tolist() == []
    assert pair(torch.zeros(3, 0)).columns.tolist() == []
    with pytest.raises(InvalidInput, match=r"table \[rows, columns\] is needed, got \[3\]"):
        pair(torch.zeros(3))
    with pytest.raises(InvalidInput, match="not finite"):
        pair(torch.tensor([[1.0, float("nan")]]))


def test_correlation_reads_neither_order_nor_sign_nor_length():
    a = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    factor = torch.linspace(-3, 3, 20)[:, None]
    assert mean_correlation(a, a[order] * factor) == pytest.approx(1, abs=1e-6)
    assert mean_correlation(a[:5], a[order]) == pytest.approx(1, abs=1e-6)
    assert mean_correlation(a, a[order[:5]]) == pytest.approx(1, abs=1e-6)


def test_correlation_pairs_one_to_one():
    # both latents are most similar to the first feature; one of them has to take the second
    latents = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    truth = torch.eye(2)
    assert mean_correlation(latents, truth) == pytest.approx((1 + 0.6) / 2)
    assert uniqueness(latents, truth) == 0.5
    assert uniqueness(truth, latents) == 1


def test_zero_rows_have_no_cosine_and_low_precision_is_widened():
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert cosines(a, a).tolist() == [[0, 0], [0, pytest.approx(1)]]
    assert cosines(a.bfloat16(), a.half()).dtype == torch.float32


@pytest.mark.parametrize(
    "a, b, says",
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"same width are needed, got \[2, 3\] and \[2, 4\]"),
        (torch.ones(3), torch.ones(2, 3), r"got \[3\] and \[2, 3\]"),
        (torch.tensor([[float("inf"), 1.0]]), torch.ones(1, 2), "first matrix has values"),
        (torch.ones(1, 2), torch.tensor([[float("nan"), 1.0]]), "second matrix has values"),
        (torch.ones(0, 2), torch.ones(1, 2), "no rows"),
    ],
)
def test_directions_that_cannot_be_compared(a, b, says):
    for measure in (mean_correlation, uniqueness):
        with pytest.raises(InvalidInput, match=says):
            measure(a, b)
