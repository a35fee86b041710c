"""Streaming statistics against numpy over all rows at once."""

import numpy as np
import pytest
import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering import Statistics


def rows(n: int = 60, steps: int = 2, features: int = 5, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, steps, features) + offset


def labels(n: int = 60) -> torch.Tensor:
    return torch.arange(n) % 3


def gathered(x: torch.Tensor, n: torch.Tensor, keep, sizes=None) -> Statistics:
    found = Statistics(keep)
    for part, own in zip(x.split(sizes or len(x)), n.split(sizes or len(x)), strict=True):
        found.add(part, own)
    return found


@pytest.mark.parametrize("keep", ["moments", "covariance", "rows"])
@pytest.mark.parametrize("sizes", [None, [1, 2, 57], [20, 20, 20]])
def test_whatever_the_batches_the_result_is_that_of_numpy(keep, sizes):
    x, n = rows(), labels()
    found = gathered(x, n, keep, sizes)
    wide = x.double().numpy()
    for group in ([0], [1, 2], [0, 1, 2]):
        own = wide[np.isin(n.numpy(), group)]
        assert found.count(group) == len(own)
        np.testing.assert_allclose(found.mean(group), own.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.variance(group), own.var(0), rtol=1e-11)
        if keep != "moments":
            for step in range(2):
                expected = np.cov(own[:, step].T, bias=True) * len(own)
                np.testing.assert_allclose(found.scatter(group, step), expected, atol=1e-11)
    assert found.labels == 3 and found.shape == (2, 5)


def test_order_does_not_show():
    x, n, order = rows(), labels(), torch.randperm(60)
    one, other = gathered(x, n, "covariance"), gathered(x[order], n[order], "covariance", [7, 53])
    torch.testing.assert_close(one.mean([1]), other.mean([1]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one.scatter([1], 0), other.scatter([1], 0), rtol=1e-12, atol=1e-12)


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance():
    noise = torch.randn(4000, 1, 3, dtype=torch.float64)
    far = gathered(noise + 1e9, torch.zeros(4000, dtype=torch.int64), "covariance", [1000] * 4)
    exact = (noise + 1e9 - 1e9).var(0, correction=0)  # as the rows are rounded
    torch.testing.assert_close(far.variance([0]), exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(far.scatter([0], 0).diagonal() / 4000, exact[0], rtol=1e-9, atol=0)
    plain = ((noise + 1e9) ** 2).mean(0) - (noise + 1e9).mean(0) ** 2
    assert not torch.allclose(plain, exact, rtol=1e-2)  # what the shift is there for


@pytest.mark.parametrize("keep", ["moments", "covariance", "rows"])
def test_merging_is_adding_all_rows(keep):
    x, n = rows(offset=5.0), labels()
    n[40:] = n[40:] + 2  # the second knows labels that the first does not
    whole = gathered(x, n, keep)
    one, other = gathered(x[:40], n[:40], keep), gathered(x[40:], n[40:], keep)
    one.merge(Statistics(keep))
    one.merge(other)
    empty = Statistics(keep)
    empty.merge(whole)
    for found in (one, empty):
        for group in ([0], [2, 3], [4]):
            assert found.count(group) == whole.count(group)
            torch.testing.assert_close(found.mean(group), whole.mean(group))
            torch.testing.assert_close(found.variance(group), whole.variance(group))
            if keep != "moments":
                torch.testing.assert_close(found.scatter(group, 1), whole.scatter(group, 1))


def test_rows_with_a_negative_label_are_left_out():
    x, n = rows(6), torch.tensor([0, -1, 0, 1, -1, 1])
    found = gathered(x, n, "rows")
    assert found.count([0, 1]) == 4
    assert torch.equal(found.rows([0], 1), x[[0, 2], 1].double())
    only_out = gathered(x[:1], torch.tensor([-1]), "moments")
    assert only_out.labels == 0 and only_out.count([0]) == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda f: f.add(torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.int64)),
            r"\[steps, features\] is \[3, 4\], before \[2, 5\]",
        ),
        (
            lambda f: f.add(torch.full((1, 2, 5), torch.nan), torch.zeros(1, dtype=torch.int64)),
            "values are not finite",
        ),
        (
            lambda f: f.merge(gathered(rows(3), labels(3), "rows")),
            r"statistics of rows \[2, 5\] cannot be merged into those of moments \[2, 5\]",
        ),
        (lambda f: f.scatter([0], 0), "covariances were not kept; ask for keep='covariance'"),
        (lambda f: f.rows([0], 0), "rows were not kept; ask for keep='rows'"),
    ],
)
def test_wrong_inputs_say_what_is_wrong_and_change_nothing(call, text):
    found = gathered(rows(), labels(), "moments")
    before = found.mean([0]).clone()
    with pytest.raises(InvalidInput, match=text):
        call(found)
    assert torch.equal(found.mean([0]), before) and found.count([0]) == 20


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UnknownName, match="'covariances'; nearest: covariance"):
        Statistics("covariances")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("sizes", [None, [1] * 8 + [392], [2, 398]], ids=["one", "singly", "two"])
@pytest.mark.parametrize("keep", ["moments", "covariance"])
def test_an_outlier_in_the_first_row_costs_no_digits_of_another_label(keep, sizes):
    for dtype, outlier, rtol in ((torch.float64, 1e8, 1e-12), (torch.float32, 1e6, 1e-12)):
        x, n = torch.randn(400, 1, 4, dtype=dtype), torch.arange(400) % 2
        x[0] = outlier
        found = gathered(x, n, keep, sizes)
        own = x[n == 1].double().numpy()
        np.testing.assert_allclose(found.mean([1]), own.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.variance([1]), own.var(0), rtol=rtol)
        every = x[:, 0].double().numpy()
        np.testing.assert_allclose(found.variance([0, 1])[0], every.var(0), rtol=1e-12)
        if keep == "covariance":
            scatter = np.cov(own[:, 0].T, bias=True) * len(own)
            np.testing.assert_allclose(found.scatter([1], 0), scatter, rtol=1e-11, atol=1e-11)


def test_labels_that_are_far_from_each_other_keep_the_digits_of_both():
    x, n = torch.randn(60, 1, 3, dtype=torch.float64), torch.arange(60) % 3
    x += 1e7 * n[:, None, None]
    found = gathered(x, n, "covariance", [30, 30])
    for label in range(3):
        near = x[n == label] - 1e7 * label  # exact: the numbers are close
        torch.testing.assert_close(
            found.variance([label]), near.var(0, correction=0), rtol=1e-11, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_kept_without_losing_digits(dtype):
    x = (1e6 + 1e-3 * torch.randn(20, 1, 3, dtype=torch.float64)).to(dtype)
    found = gathered(x, labels(20) * 0, "rows", [10, 10])
    assert torch.equal(found.rows([0], 0), x[:, 0].double())
    mixed = Statistics("rows")
    mixed.add(x.float(), labels(20) * 0)
    mixed.add(x, labels(20) * 0)
    assert torch.equal(mixed.rows([0], 0)[20:], x[:, 0].double())
