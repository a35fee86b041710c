"""Scores against brute force over all rows, and controls against maps that are really drawn."""

import numpy as np
import pytest
import scipy.stats
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


def draw(rows: int = 300, d_source: int = 5, d_target: int = 4) -> PairedRows:
    x = torch.randn(rows, d_source) @ torch.randn(d_source, d_source) + 3
    y = torch.tanh(x @ torch.randn(d_source, d_target)) * torch.arange(1, d_target + 1) + 7
    return PairedRows(x, y + 0.3 * torch.randn(rows, d_target))


def perceptron(d_source: int = 5, d_target: int = 4) -> MLPMap:
    shapes = ((d_source,), (6, d_source), (6,), (d_target, 6), (d_target,))
    return MLPMap(*(torch.randn(shape) for shape in shapes))


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
        assert scipy.stats.ks_2samp(report.controls[name].fvu, values).pvalue > 1e-3, name
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
    assert scipy.stats.ks_2samp(report.controls["shuffled"].fvu, drawn).pvalue > 1e-3


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
    with pytest.raises(InvalidInput, match="draws is at least 1, got 0"):
        score_map(own, rows, draws=0)
    with pytest.raises(InvalidInput, match="no held-out rows that count"):
        score_map(own, PairedRows(rows.x, rows.y, torch.zeros(300, 1)))
