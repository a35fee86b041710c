"""Streaming cross moments: equal to two passes over all rows, whatever the batches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping import CrossMoments, PairedRows
from dreamreader.recording import Pairs


def draw(rows: int, d_source: int = 3, d_target: int = 2) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, d_source, dtype=torch.float64)
    return x, x[:, :1] * 2 + torch.randn(rows, d_target, dtype=torch.float64)


def collect(x: Tensor, y: Tensor, sizes: list[int], weights: Tensor | None = None) -> CrossMoments:
    found = CrossMoments(x.shape[1], y.shape[1], gram=True)
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    own = [None] * len(sizes) if weights is None else weights.split(sizes)
    for (one, other), weight in zip(parts, own, strict=True):
        found.add(one, other, weight)
    return found


def assert_equal(found: CrossMoments, x: Tensor, y: Tensor, w: Tensor | None = None) -> None:
    """Against sums of 80 bits over all rows at once."""
    weight = np.ones(len(x)) if w is None else w.numpy()
    weight = weight.astype(np.longdouble)
    sides = [each.numpy().astype(np.longdouble) for each in (x, y)]
    means = [(weight @ each) / weight.sum() for each in sides]
    a, b = (each - mean for each, mean in zip(sides, means, strict=True))
    expected = {
        "source_mean": means[0],
        "target_mean": means[1],
        "source_scatter": (a.T * weight) @ a,
        "cross_scatter": (a.T * weight) @ b,
        "target_scatter": (b.T * weight) @ b,
        "target_squares": weight @ b**2,
    }
    assert found.weight == pytest.approx(float(weight.sum()))
    for name, value in expected.items():
        own = getattr(found, name).numpy()
        np.testing.assert_allclose(own, value.astype(float), rtol=1e-10, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("sizes", [[9000], [1, 8999], [4096, 4096, 808], [17] * 529 + [7]])
def test_batches_of_any_size_give_the_moments_of_all_rows(sizes: list[int]) -> None:
    x, y = draw(9000)
    assert_equal(collect(x, y, sizes), x, y)


def test_weights_count_as_repeated_rows() -> None:
    x, y = draw(300)
    w = torch.randint(0, 4, (300,)).double()
    found = collect(x, y, [100, 200], w)
    assert found.rows == int((w > 0).sum())
    repeated = [each.repeat_interleave(w.long(), 0) for each in (x, y)]
    assert_equal(found, *repeated)
    assert_equal(found, x, y, w)


def test_means_that_are_far_and_drift_cost_no_digits() -> None:
    x, y = draw(9000)
    drift = torch.arange(9000).div(3000, rounding_mode="floor").double().unsqueeze(1) * 1e3
    x, y = x + 1e7 + drift, y - 1e7
    assert_equal(collect(x, y, [3000] * 3), x, y)


def test_sums_of_parts_are_the_sums_of_all_in_either_order() -> None:
    x, y = draw(500)
    x, y = x + 1e4, y * 10
    x[100:] += 1e5  # so that the parts are about other shifts
    parts = collect(x[:100], y[:100], [100]), collect(x[100:], y[100:], [400])
    for found in (parts[0] + parts[1], parts[1] + parts[0]):
        assert found.rows == 500
        assert_equal(found, x, y)
    empty = CrossMoments(3, 2, gram=True)
    assert_equal(empty + parts[0], x[:100], y[:100])
    assert_equal(parts[0] + empty, x[:100], y[:100])
    assert_equal(parts[0], x[:100], y[:100])  # which a sum leaves as they were
    assert (empty + empty).rows == 0


def test_memory_does_not_grow_with_rows() -> None:
    found = CrossMoments(3, 2)

    def size() -> int:
        return sum(each.numel() for each in vars(found).values() if isinstance(each, Tensor))

    found.add(*draw(10))
    before = size()
    for _ in range(3):
        found.add(*draw(5000))
    assert size() == before and found.rows == 15_010


def test_moments_of_mapped_rows_need_no_rows() -> None:
    x, y = draw(400)
    w, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert_equal(collect(x, y, [400]).through(w, b), x @ w.T + b, y)


def test_what_stands_in_padding_does_not_exist() -> None:
    x, y = draw(6)
    expected = collect(x[:4], y[:4], [4])
    x[4:], y[5] = torch.nan, torch.inf
    found = CrossMoments(3, 2, gram=True)
    found.add(x.view(2, 3, 3), y.view(2, 3, 2), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert found.rows == 4
    assert torch.equal(found.cross_scatter, expected.cross_scatter)


def test_rows_that_are_not_finite_are_refused_and_nothing_is_added() -> None:
    x, y = draw(8)
    found = CrossMoments(3, 2)
    bad = x.clone()
    bad[3, 1], bad[5, 0] = torch.nan, torch.inf
    with pytest.raises(InvalidInput, match=r"2 of 8 source rows are not finite.*row 3"):
        found.add(bad, y)
    with pytest.raises(InvalidInput, match=r"1 of 8 target rows are not finite.*row 7"):
        found.add(x, y.index_fill(0, torch.tensor(7), torch.nan))
    assert found.rows == 0 and found.weight == 0


def test_bad_input() -> None:
    x, y = draw(8)
    found = CrossMoments(3, 2)
    with pytest.raises(InvalidInput, match=r"source must be \[\.\.\., rows, 3\], got \[8, 2\]"):
        found.add(y, x)
    with pytest.raises(InvalidInput, match=r"as many rows on both sides.*\[8\] and \[7\]"):
        found.add(x, y[:7])
    with pytest.raises(InvalidInput, match=r"weights must be \[8\], got \[8, 1\]"):
        found.add(x, y, torch.ones(8, 1))
    with pytest.raises(InvalidInput, match="weights are finite and at least 0"):
        found.add(x, y, -torch.ones(8))
    with pytest.raises(InvalidInput, match="source must be floating point, .* got torch.int64"):
        found.add(x.long(), y)
    with pytest.raises(InvalidInput, match="ask for gram=True"):
        _ = found.target_scatter
    with pytest.raises(InvalidInput, match="d_target is a whole number from 1, got 0"):
        CrossMoments(3, 0)
    with pytest.raises(InvalidInput, match="3 -> 2 features with gram cannot be joined"):
        _ = CrossMoments(3, 2, gram=True) + found


def test_pairs_of_a_recording_are_rows_with_their_calls_and_without_padding() -> None:
    source, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6)
    counts = torch.tensor([4, 1])
    pairs = Pairs({"a": source}, {"b": target}, (7, 8, 9), {"a": counts, "b": counts})
    rows = PairedRows.of(pairs, "a", "b", levels=[3.0, 2.0, 1.0])
    assert (len(rows), rows.source_site, rows.target_site) == (6, "a", "b")
    assert rows.groups is not None and rows.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.steps is not None and rows.steps.tolist() == [7, 8, 9] * 2
    assert rows.levels is not None and rows.levels.tolist() == [3, 2, 1] * 2
    own = torch.cat([source[0].flatten(0, 1), source[1, :, 0]])
    other = torch.cat([target[0].flatten(0, 1), target[1, :, 0]])
    x, y, w = rows.flat()
    assert torch.equal(x, own) and torch.equal(y, other) and w is not None and bool((w == 1).all())
    assert_equal(rows.moments(gram=True), own.double(), other.double())
    by_row = PairedRows.of(pairs, "a", "b", weigh="rows").moments(gram=True)
    weights = torch.tensor([0.25] * 12 + [1.0] * 3, dtype=torch.float64)
    assert_equal(by_row, own.double(), other.double(), weights)


def test_pairs_are_read_from_either_side() -> None:
    x, y = draw(5)
    back = PairedRows(x, y, steps=torch.arange(5), source_site="a", target_site="b").reversed()
    assert torch.equal(back.x.squeeze(1), y) and torch.equal(back.y.squeeze(1), x)
    assert (back.source_site, back.target_site, back.d_source) == ("b", "a", 2)
    assert back.steps is not None and back.steps.tolist() == [0, 1, 2, 3, 4]


def test_blocks_have_the_sequences_that_were_chosen() -> None:
    rows = PairedRows(torch.randn(9, 4, 2), torch.randn(9, 4, 2))
    where = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0]).bool()
    found = list(rows.blocks(8, where=where))
    assert [len(each) for each in found] == [2, 1]  # and no empty ones
    assert torch.equal(torch.cat([each.x for each in found]), rows.x[where])
    assert len(list(rows.blocks(8))) == 5


def test_groups_are_held_out_whole() -> None:
    rows = PairedRows(torch.randn(12, 2, 3), torch.randn(12, 2, 3), groups=torch.arange(12) // 3)
    for seed in range(5):
        train, held = rows.split(0.25, seed)
        assert train.groups is not None and held.groups is not None
        assert (len(train), len(held)) == (9, 3)
        assert not set(train.groups.tolist()) & set(held.groups.tolist())
    with pytest.raises(InvalidInput, match="of 1 groups .* cannot be held out"):
        rows.select(torch.arange(3)).split()


def test_pairs_that_do_not_belong_together() -> None:
    pairs = Pairs({"a": torch.zeros(2, 1, 4, 5)}, {"b": torch.zeros(2, 1, 3, 5)}, None)
    with pytest.raises(InvalidInput, match="a has 4 tokens and b 3"):
        PairedRows.of(pairs, "a", "b")
    with pytest.raises(UnknownName, match="source site of pairs 'b'; nearest: a"):
        PairedRows.of(pairs, "b", "b")
    with pytest.raises(UnknownName, match="weighting of pairs 'row'"):
        PairedRows.of(pairs, "a", "b", weigh="row")
    same = Pairs({"a": torch.zeros(2, 1, 4, 5)}, {"b": torch.zeros(2, 1, 4, 5)}, None)
    with pytest.raises(InvalidInput, match="1 calls, but 2 noise levels"):
        PairedRows.of(same, "a", "b", levels=[1.0, 2.0])
    x: Any = torch.zeros(4, 2)
    with pytest.raises(InvalidInput, match=r"got list; torch.tensor\(\.\.\.\) makes one of a list"):
        PairedRows(x.tolist(), x)
    with pytest.raises(InvalidInput, match=r"x must be \[rows, features\] or .*, got \[4\]"):
        PairedRows(x[:, 0], x[:, 0])
    with pytest.raises(InvalidInput, match="groups must be numbers, got list"):
        PairedRows(x, x, groups=["a", "b", "a", "b"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="steps are whole numbers, got torch.float32"):
        PairedRows(x, x, steps=torch.ones(4))
    with pytest.raises(InvalidInput, match="levels are numbers from 0, some are not"):
        PairedRows(x, x, levels=torch.tensor([1.0, torch.nan, 1.0, 1.0]))
    with pytest.raises(InvalidInput, match="weights are numbers from 0, some are not"):
        PairedRows(x, x, weights=-torch.ones(4, 1))
    with pytest.raises(InvalidInput, match="record_between gives is needed, got Tensor"):
        PairedRows.of(x, "a", "b")
    with pytest.raises(InvalidInput, match=r"chosen by a slice or a list, got \[\]"):
        PairedRows(x, x).select(2)  # pyright: ignore[reportArgumentType]
    for index, text in (
        ([999], "sequence 999 asked for, there are 4"),
        ([0, -5], "sequence -5 asked for, there are 4"),
        ([True, False], "the mask has 2 values for 4 sequences"),
        ([0.0], "chosen by whole numbers, got torch.float32"),
    ):
        with pytest.raises(InvalidInput, match=text):
            PairedRows(x, x).select(index)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="seed is a whole number, got None"):
        PairedRows(x, x).split(seed=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"groups must be \[4\], got \[3\]"):
        PairedRows(torch.zeros(4, 2), torch.zeros(4, 2), groups=torch.arange(3))
    with pytest.raises(InvalidInput, match="x must be floating point, .* got torch.int64"):
        PairedRows(torch.zeros(4, 2).long(), torch.zeros(4, 2))
    with pytest.raises(InvalidInput, match="no rows that count"):
        PairedRows(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2)).moments()
