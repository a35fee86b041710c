"""Pools of columns by their scores, and the selection inside of them."""

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.ops import batch_topk, choose_pool, column_scores, sampled_topk
from tests.cases._matrices import matrix


def test_the_top_columns_with_ties_to_the_smaller_and_nan_first():
    scores = torch.tensor([1.0, 2.0, torch.nan, 2.0, 2.0, 0.0])
    assert choose_pool(scores, 1).tolist() == [2]
    assert choose_pool(scores, 3).tolist() == [1, 2, 3]
    assert choose_pool(scores, 9).tolist() == [0, 1, 2, 3, 4, 5]
    assert choose_pool(scores, 0).dtype == torch.int32


def test_columns_are_drawn_in_proportion_to_their_scores():
    scores, g = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.Generator().manual_seed(1)
    drawn = torch.cat([choose_pool(scores, 1, "sampled", g) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert (shares - scores / 8).abs().max() < 0.03 and shares[2] == 0


def test_a_seed_gives_the_same_pool_and_another_another():
    scores = torch.rand(200)
    first, again, other = (
        choose_pool(scores, 50, "sampled", torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first.diff() > 0).all() and len(first) == 50


@pytest.mark.parametrize("rule", ["top", "sampled"])
def test_it_is_a_batch_selection_inside_of_the_pool(rule: str):
    x = matrix("normal", (40, 300), torch.float32)
    codes = sampled_topk(
        x, 100, 30, score="entropy", rule=rule, generator=torch.Generator().manual_seed(3)
    )
    scores = column_scores(x, "entropy")
    pool = choose_pool(scores, 30, rule, torch.Generator().manual_seed(3))
    inside = torch.zeros_like(x)
    inside[:, pool] = x[:, pool]
    assert torch.equal(codes.dense(), batch_topk(inside, 100).dense())
    assert torch.equal(sampled_topk(x, 100, pool=pool).dense(), codes.dense())


def test_a_pool_of_all_columns_is_a_batch_selection():
    x = matrix("half_ties", (40, 300), torch.bfloat16)
    both = sampled_topk(x, 500, 300), batch_topk(x, 500)
    assert torch.equal(both[0].columns, both[1].columns)
    assert torch.equal(both[0].values, both[1].values)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: choose_pool(torch.rand(3), -1), "size must be 0 or more, got -1"),
        (
            lambda: choose_pool(torch.rand(3), 1, "best"),
            "rule must be one of top, sampled, got best",
        ),
        (
            lambda: choose_pool(torch.rand(3, 1), 1),
            r"floating point \[width\], got float32 \[3, 1\]",
        ),
        (lambda: sampled_topk(torch.ones(2, 2), 1), "give the size of the pool, or the pool"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()
