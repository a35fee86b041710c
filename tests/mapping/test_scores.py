"""Scores against brute force over all rows, and controls against maps that are really drawn."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping import (
    ActivationMap,
    AffineMap,
    MLPMap,
    PairedRows,
    compare_maps,
    fit_map,
    score_map,
)
from dreamreader.mapping.controls import find_exchangeable


def draw(rows: int = 300, d_source: int = 5, d_target: int = 4) -> PairedRows:
    x = torch.randn(rows, d_source) @ torch.randn(d_source, d_source) + 3
    y = torch.tanh(x @ torch.randn(d_source, d_target)) * torch.arange(1, d_target + 1) + 7
    return PairedRows(x, y + 0.3 * torch.randn(rows, d_target))


def perceptron(d_source: int = 5, d_target: int = 4) -> MLPMap:
    shapes = ((d_source,), (6, d_source), (6,), (d_target, 6), (d_target,))
    return MLPMap(*(torch.randn(shape) for shape in shapes))


def alike(one: Sequence[float], other: Sequence[float] | np.ndarray) -> bool:
    """Whether the test of Kolmogorov and Smirnov finds nothing at p = 0.001."""
    a, b = np.sort(one), np.sort(other)
    both = np.concatenate([a, b])
    shares = [np.searchsorted(each, both, "right") / len(each) for each in (a, b)]
    return np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(1 / len(a) + 1 / len(b))


def cka(a: Tensor, b: Tensor) -> float:
    """From the similarities of rows with rows, each centred."""
    count = len(a)
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    one, other = (centre @ (each @ each.T) @ centre for each in (a, b))
    return float((one * other).sum() / (one.norm() * other.norm()))


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_scores_are_their_formulas(kind: str) -> None:
    rows = draw()
    own: ActivationMap = fit_map(rows, "ridge") if kind == "ridge" else perceptron()
    report = score_map(own, rows)
    x, y = (each.flatten(0, 1).double() for each in (rows.x, rows.y))
    z = own.apply(x)
    errors, mean = (z - y).square(), y.mean(0)
    by_dimension = errors.sum(0) / (y - mean).square().sum(0)
    expected = {
        "rows": 300,
        "fvu": errors.sum() / (y - mean).square().sum(),
        "fvu_scalar": errors.sum() / (y - y.mean()).square().sum(),
        "r2": (1 - by_dimension).mean(),
        "cosine": ((z * y).sum(1) / (z.norm(dim=1) * y.norm(dim=1))).mean(),
        "cka_source": cka(x, y),
        "cka": cka(z, y),
        "sampled": 300,
    }
    for name, value in expected.items():
        assert getattr(report, name) == pytest.approx(float(value), rel=1e-5), name
    torch.testing.assert_close(report.fvu_by_dimension, by_dimension, rtol=1e-5, atol=1e-7)
    near = (z - mean) @ ((y - mean) / (y - mean).norm(dim=1, keepdim=True)).T
    hits = (near.argmax(1) == torch.arange(300)).double().mean()
    assert report.retrieval == pytest.approx(float(hits))
    cosine = ((y @ mean) / (y.norm(dim=1) * mean.norm())).mean()
    assert report.controls["mean"].cosine == pytest.approx(float(cosine), rel=1e-6)
    assert report.controls["mean"].fvu == (1.0,)
    assert report.fvu_scalar < report.fvu


def test_moments_and_rows_give_the_same() -> None:
    rows = draw()
    own = fit_map(rows, "ridge")
    one, other = score_map(own, rows), score_map(own, rows.moments(gram=True))
    for name in ("rows", "fvu", "fvu_scalar", "r2", "cka_source", "cka"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5), name
    torch.testing.assert_close(one.fvu_by_dimension, other.fvu_by_dimension, rtol=1e-5, atol=0)
    for name in ("random", "random, scaled"):
        np.testing.assert_allclose(one.controls[name].fvu, other.controls[name].fvu, rtol=1e-5)
        assert one.controls[name].p == other.controls[name].p
    assert other.cosine is other.retrieval is None and "shuffled" not in other.controls
    plain = score_map(own, rows.moments())
    assert plain.cka is plain.cka_source is None and plain.fvu == pytest.approx(other.fvu)


def test_weights_count_as_repeated_rows_and_padding_not_at_all() -> None:
    rows, own = draw(120), perceptron()
    weights = torch.randint(0, 3, (40, 3)).double()
    repeated = weights.flatten().long()
    x, y = (each.flatten(0, 1).repeat_interleave(repeated, 0) for each in (rows.x, rows.y))
    expected = score_map(own, PairedRows(x, y))
    x, y = rows.x.view(40, 3, 5).clone(), rows.y.view(40, 3, 4).clone()
    x[weights == 0], y[weights == 0] = torch.nan, torch.nan
    found = score_map(own, PairedRows(x, y, weights))
    assert found.rows == found.sampled == int((weights > 0).sum())
    for name in ("fvu", "fvu_scalar", "r2", "cosine", "cka_source", "cka"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


def test_random_maps_are_as_if_they_were_drawn() -> None:
    rows = draw(200, 4, 3)
    own = fit_map(rows, "ridge")
    report = score_map(own, rows, draws=4000)
    x, y = (each.flatten(0, 1).double() for each in (rows.x, rows.y))
    a, b = x - x.mean(0), y - y.mean(0)
    size = (own.apply(x) - own.apply(x).mean(0)).square().sum()
    equal, scaled = [], []
    for _ in range(4000):
        z = a @ torch.randn(4, 3, dtype=torch.float64)
        equal.append(float((z * (size / z.square().sum()).sqrt() - b).square().sum()))
        best = (z * b).sum() / z.square().sum()
        scaled.append(float((best * z - b).square().sum()))
    total = float(b.square().sum())
    for name, drawn in (("random", equal), ("random, scaled", scaled)):
        values = np.array(drawn) / total
        assert alike(report.controls[name].fvu, values), name
        found = report.controls[name].quantiles()
        np.testing.assert_allclose(found, np.quantile(values, [0.05, 0.5, 0.95]), rtol=0.05)


def test_one_target_dimension_has_random_maps_too() -> None:
    rows = draw(100, 4, 1)
    report = score_map(fit_map(rows, "ridge"), rows)
    assert report.controls["random"].p is not None and report.controls["random"].p < 0.05


def test_p_is_the_share_of_draws_that_are_as_good() -> None:
    rows = draw()
    good, bad = score_map(fit_map(rows, "ridge"), rows), score_map(perceptron(), rows)
    for name in ("random", "random, scaled", "shuffled"):
        assert good.controls[name].p == pytest.approx(1 / 1001)
        assert len(good.controls[name].fvu) == 1000
    p, draws = bad.controls["random, scaled"].p, bad.controls["random, scaled"].fvu
    assert p == pytest.approx((1 + sum(each <= bad.fvu for each in draws)) / 1001)
    low, middle, high = good.controls["shuffled"].quantiles()
    assert good.fvu < low < middle < high


def test_shuffled_pairs_are_what_they_say() -> None:
    rows = draw(80)
    own = fit_map(rows, "ridge")
    report = score_map(own, rows, draws=3000)
    z, y = own.apply(rows.x).flatten(0, 1).double(), rows.y.flatten(0, 1).double()
    total = (y - y.mean(0)).square().sum()
    drawn = [float((z[torch.randperm(80)] - y).square().sum() / total) for _ in range(3000)]
    assert alike(report.controls["shuffled"].fvu, drawn)


def test_groups_change_places_whole() -> None:
    """Against permutations of pictures; rows of one picture say nothing of another."""
    picture, noise = torch.randn(5, 1, 1, 3), 0.01 * torch.randn(5, 4, 6, 3)
    y = picture + noise + torch.arange(4).view(1, 4, 1, 1)  # which the step tells
    order = torch.randperm(20)
    rows = PairedRows(
        y.reshape(20, 6, 3)[order],
        y.reshape(20, 6, 3)[order],
        groups=torch.arange(20)[order] // 4 + 7,
        steps=torch.arange(20)[order] % 4,
    )
    exact = AffineMap(torch.zeros(3), torch.eye(3), torch.zeros(3))
    report = score_map(exact, rows)
    control = report.controls["shuffled"]
    assert report.groups == 5 and len(control.fvu) == 119  # 5! orders, less that of the map
    assert control.p == pytest.approx(1 / 120)
    total = (y - y.mean((0, 1, 2))).square().sum()
    drawn = [
        float((y[list(own)] - y).square().sum() / total) for own in itertools.permutations(range(5))
    ]
    np.testing.assert_allclose(control.fvu, sorted(drawn)[1:], rtol=1e-4)
    blind = AffineMap(torch.zeros(3), torch.zeros(3, 3), torch.zeros(3))
    assert score_map(blind, rows).controls["shuffled"].p == 1
    one = PairedRows(rows.x, rows.y, groups=torch.zeros(20, dtype=torch.long))
    alone = score_map(exact, one)
    assert alone.groups == 0 and "shuffled" not in alone.controls
    assert alone.as_dict()["groups"] == 0


def test_a_p_of_rows_that_depend_on_each_other_is_not_small() -> None:
    """Two pictures of many equal rows: a map that tells them apart has one of two orders."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(500, 0).view(2, 500, 2)
    rows = PairedRows(x, x + 0.01 * torch.randn(2, 500, 2))
    exact = AffineMap(torch.zeros(2), torch.eye(2), torch.zeros(2))
    assert score_map(exact, rows).controls["shuffled"].p == 0.5


def test_only_places_that_all_groups_have_change() -> None:
    rows = PairedRows(torch.randn(9, 4, 3), torch.randn(9, 4, 3), groups=torch.arange(9) // 2)
    assert rows.weights is None
    counts = torch.tensor([4, 1, 3, 4, 4, 4, 2, 4, 4])
    weights = (torch.arange(4) < counts.unsqueeze(1)).double()
    padded = PairedRows(rows.x, rows.y, weights, rows.groups)
    numbers = find_exchangeable(padded, 1000, torch.Generator().manual_seed(0))
    assert numbers is not None
    first = torch.tensor([0, 2, 4, 6, 8])  # the last group has one sequence
    expected = (first.unsqueeze(1) * 4 + torch.arange(2)).sort(0).values
    assert torch.equal(numbers.sort(0).values.sort(1).values, expected)
    assert torch.equal(numbers // 4 % 2, torch.zeros_like(numbers))
    few = find_exchangeable(padded, 3, torch.Generator().manual_seed(0))
    assert few is not None and few.shape == (3, 1)
    nowhere = PairedRows(rows.x, rows.y, weights, rows.groups, steps=torch.arange(9))
    assert find_exchangeable(nowhere, 1000, torch.Generator()) is None


def test_equal_rows_are_no_misses() -> None:
    x = torch.randn(50, 3).repeat(2, 1)
    exact = AffineMap(torch.zeros(3), torch.eye(3), torch.zeros(3))
    assert score_map(exact, PairedRows(x, x)).retrieval == pytest.approx(0.5)


def test_a_sample_and_blocks_change_nothing_but_what_is_sampled() -> None:
    rows, own = draw(9000, 3, 2), perceptron(3, 2)
    whole, part = score_map(own, rows), score_map(own, rows, sample=100, seed=1)
    assert (whole.sampled, part.sampled) == (2048, 100)
    assert part.fvu == whole.fvu and part.cosine == whole.cosine
    assert part.retrieval is not None and 0 < part.retrieval < 1


def test_dimensions_that_do_not_vary_are_left_out() -> None:
    rows = draw()
    y = torch.cat([rows.y, torch.ones(300, 1, 1)], 2)
    flat = PairedRows(rows.x, y)
    report = score_map(fit_map(flat, "ridge", lambdas=0.0), flat)
    assert bool(report.fvu_by_dimension[-1].isnan()) and report.r2 == report.r2
    kept = report.fvu_by_dimension[:-1]
    assert report.r2 == pytest.approx(float((1 - kept).mean()))


def test_tables() -> None:
    rows = draw()
    train, held = rows.split()
    reports = {name: score_map(fit_map(train, name), held) for name in ("mean", "ridge")}
    report = reports["ridge"]
    head, lines = report.table()
    assert head[:3] == ["", "FVU", "FVU scalar"]
    assert [line[0] for line in lines] == ["ridge", "mean", "random", "random, scaled", "shuffled"]
    assert all(len(line) == len(head) for line in lines)
    assert lines[0][1] == f"{report.fvu:.3f}" and lines[2][-1] == "0.0010"
    assert str(report).splitlines()[1].startswith("ridge  ")
    plain = report.as_dict()
    assert plain["fvu"] == report.fvu and plain["controls"]["random"]["draws"] == 1000
    kept = fit_map(train, "ridge").with_card(scores=plain)
    assert kept.card.scores["fvu"] == report.fvu
    named = {**reports, "mlp": score_map(perceptron().with_card(method="mlp"), held)}
    head, lines = compare_maps(named)
    assert [line[0] for line in lines] == ["ridge", "mean", "mlp", "mlp does not beat ridge"]
    with pytest.raises(InvalidInput, match="reports of the same held-out pairs are needed"):
        compare_maps({})


def test_bad_input() -> None:
    rows = draw()
    own = fit_map(rows, "ridge")
    with pytest.raises(InvalidInput, match="leads from 5 to 4 features, the pairs from 4 to 5"):
        score_map(own, PairedRows(rows.y, rows.x))
    with pytest.raises(InvalidInput, match="only an affine map is measured from moments"):
        score_map(perceptron(), rows.moments())
    with pytest.raises(InvalidInput, match="1 held-out pairs have no variance"):
        score_map(own, rows.select(torch.arange(1)))
    with pytest.raises(InvalidInput, match="the held-out target rows are all equal"):
        score_map(own, PairedRows(rows.x, torch.ones_like(rows.y)))
    with pytest.raises(InvalidInput, match="1 of 300 source rows are not finite"):
        score_map(own, PairedRows(rows.x.index_fill(0, torch.tensor(5), torch.nan), rows.y))
    given: Any = (rows.x, rows.y)
    with pytest.raises(InvalidInput, match=r"got tuple; PairedRows\(x, y\) makes them of rows"):
        score_map(own, given)
    with pytest.raises(InvalidInput, match="score_map: a map is needed, got tuple"):
        score_map(given, rows)
    for sample in (0, 1, 2.5, True):
        with pytest.raises(InvalidInput, match="sample is a whole number from 2, got"):
            score_map(own, rows, sample=sample)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="seed is a whole number, got None"):
        score_map(own, rows, seed=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="draws is a whole number from 1, got 0"):
        score_map(own, rows, draws=0)
    with pytest.raises(InvalidInput, match="no held-out rows that count"):
        score_map(own, PairedRows(rows.x, rows.y, torch.zeros(300, 1)))
