"""Fits against independent solutions: least squares, polar decomposition, brute force."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import Recipe
from dreamreader.mapping import (
    METHODS,
    AffineMap,
    LocalMap,
    MLPMap,
    NoiseConditionedMap,
    PairedRows,
    StepMaps,
    fit_map,
    score_map,
)
from dreamreader.mapping.fit import check_options


def draw(rows: int = 200, d_source: int = 5, d_target: int = 4, noise: float = 0.5) -> PairedRows:
    """Pairs with means far from 0 and features of unequal variance that are correlated."""
    x = torch.randn(rows, d_source) @ torch.randn(d_source, d_source) + 3
    y = x @ torch.randn(d_source, d_target) + noise * torch.randn(rows, d_target) - 7
    return PairedRows(x, y)


def sides(rows: PairedRows) -> tuple[np.ndarray, np.ndarray]:
    x, y, _ = rows.flat()
    return x.double().numpy(), y.double().numpy()


def affine(rows: PairedRows, method: str, **options: Any) -> AffineMap:
    found = fit_map(rows, method, **options)
    assert isinstance(found, AffineMap)
    return found


def penalised(rows: PairedRows, share: float) -> tuple[np.ndarray, np.ndarray]:
    """W and b of ridge by least squares of rows with the penalty as more rows."""
    x, y = sides(rows)
    a, b = x - x.mean(0), y - y.mean(0)
    penalty = share * (a**2).sum() / a.shape[1]
    more = np.sqrt(penalty) * np.eye(a.shape[1])
    w = np.linalg.lstsq(np.vstack([a, more]), np.vstack([b, np.zeros((len(more), b.shape[1]))]))[0]
    return w.T, y.mean(0) - w.T @ x.mean(0)


def fvu(rows: PairedRows, weight: np.ndarray, bias: np.ndarray) -> float:
    x, y = sides(rows)
    return float(((x @ weight.T + bias - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.5])
def test_ridge_is_least_squares_with_the_penalty_as_rows(share: float) -> None:
    rows = draw()
    found = affine(rows, "ridge", lambdas=share)
    weight, bias = penalised(rows, share)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.bias, bias, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.source_mean, sides(rows)[0].mean(0), rtol=1e-5)


def test_ridge_tends_to_least_squares() -> None:
    rows = draw()
    exact = affine(rows, "ridge", lambdas=0.0).weight
    apart = [(affine(rows, "ridge", lambdas=s).weight - exact).norm() for s in (1e-1, 1e-3, 1e-9)]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-4


def test_the_penalty_is_the_best_on_what_is_held_out() -> None:
    rows = draw(60, 12, 6, noise=8.0)
    train, held = rows.split(0.5)
    shares = [0.0, 1e-2, 1e-1, 0.5, 1.0, 5.0]
    expected = [fvu(held, *penalised(train, share)) for share in shares]
    assert expected.index(min(expected)) not in (0, len(shares) - 1)  # or nothing is chosen
    found = fit_map(train, "ridge", validation=held, lambdas=shares)
    np.testing.assert_allclose(found.card.settings["held_out_fvu"], expected, rtol=1e-8)
    assert found.card.settings["lambda"] == shares[expected.index(min(expected))]
    by_moments = fit_map(train.moments(), "ridge", validation=held.moments(), lambdas=shares)
    assert by_moments == found
    own = fit_map(rows, "ridge", share=0.5, lambdas=shares)  # which draws the same split
    assert own == found


def test_ridge_with_weights_ignores_padding() -> None:
    rows = draw(60)
    x, y = rows.x.view(20, 3, 5).clone(), rows.y.view(20, 3, 4).clone()
    weights = torch.ones(20, 3)
    weights[::2, 1:] = 0
    kept = weights.flatten() > 0
    expected = fit_map(PairedRows(rows.x[kept], rows.y[kept]), "ridge", lambdas=0.1)
    x[::2, 1:], y[::2, 1:] = torch.nan, 1e9
    assert fit_map(PairedRows(x, y, weights), "ridge", lambdas=0.1) == expected


@pytest.mark.parametrize("scale", [False, True])
def test_procrustes_is_the_orthogonal_factor_of_the_products(scale: bool) -> None:
    rows = draw(d_source=5, d_target=5)
    x, y = sides(rows)
    a, b = x - x.mean(0), y - y.mean(0)
    polar = b.T @ a
    for _ in range(60):  # Newton's iteration to the nearest orthogonal matrix
        polar = (polar + np.linalg.inv(polar).T) / 2
    factor = (polar * (b.T @ a)).sum() / (a**2).sum() if scale else 1.0
    found = affine(rows, "procrustes", scale=scale)
    np.testing.assert_allclose(found.weight, factor * polar, atol=1e-5)
    np.testing.assert_allclose(found.apply(rows.x).mean((0, 1)), y.mean(0), rtol=1e-4)
    assert found.card.settings["scale"] == pytest.approx(factor)


@pytest.mark.parametrize(("d_source", "d_target"), [(5, 3), (3, 5)])
def test_procrustes_of_unequal_widths_is_semi_orthogonal_and_the_best(
    d_source: int, d_target: int
) -> None:
    rows = draw(d_source=d_source, d_target=d_target)
    weight = affine(rows, "procrustes").weight.double()
    inner = weight.T @ weight if d_target > d_source else weight @ weight.T
    torch.testing.assert_close(inner, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    cross = rows.moments().cross_scatter
    best = float((weight.T * cross).sum())
    for _ in range(200):
        other = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0]
        assert float(((other.T if d_target > d_source else other) * cross).sum()) < best
    scaled = affine(rows, "procrustes", scale=True)
    factor = scaled.card.settings["scale"]
    errors = [
        fvu(
            rows,
            f * weight.numpy(),
            sides(rows)[1].mean(0) - f * weight.numpy() @ sides(rows)[0].mean(0),
        )
        for f in (factor, factor * 1.01, factor * 0.99)
    ]
    assert errors[0] < min(errors[1:])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_reduced_rank_is_the_best_of_its_rank(share: float) -> None:
    rows = draw(300, 6, 5, noise=3.0)
    x, y = (each - each.mean(0) for each in sides(rows))
    penalty = np.sqrt(share * (x**2).sum() / 6) * np.eye(6)
    x, y = np.vstack([x, penalty]), np.vstack([y, np.zeros((6, 5))])
    for rank in (1, 3):
        weight = affine(rows, "reduced_rank", rank=rank, lambdas=share).weight.double().numpy()
        assert np.linalg.matrix_rank(weight, tol=1e-4) == rank
        left = np.random.default_rng(0).normal(size=(5, rank))  # alternating least squares
        right = np.zeros((rank, 6))
        for _ in range(300):
            right = np.linalg.lstsq(x, y @ np.linalg.pinv(left).T)[0].T
            left = np.linalg.lstsq(x @ right.T, y)[0].T
        expected = ((x @ (left @ right).T - y) ** 2).sum()
        assert ((x @ weight.T - y) ** 2).sum() == pytest.approx(expected, rel=1e-6)
    full = affine(rows, "reduced_rank", rank=5, lambdas=0.1).weight
    torch.testing.assert_close(full, affine(rows, "ridge", lambdas=0.1).weight)


def test_the_rank_is_the_best_on_what_is_held_out() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(80, 12, generator=generator)
    thin = torch.randn(12, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
    rows = PairedRows(x, x @ thin + 4 * torch.randn(80, 10, generator=generator))
    train, held = rows.split(0.5)
    found = fit_map(train, "reduced_rank", validation=held, lambdas=0.1)
    ranks = [1, 2, 4, 8, 10]
    expected = []
    for rank in ranks:
        one = affine(train, "reduced_rank", rank=rank, lambdas=0.1)
        expected.append(fvu(held, one.weight.double().numpy(), one.bias.double().numpy()))
    settings = found.card.settings
    np.testing.assert_allclose(settings["held_out_fvu_of_ranks"], expected, rtol=1e-4)
    assert settings["rank"] == 2 == ranks[expected.index(min(expected))]


def test_identity_is_cut_or_padded_and_the_mean_knows_nothing() -> None:
    narrow, wide = draw(d_source=5, d_target=3), draw(d_source=3, d_target=5)
    assert torch.equal(fit_map(narrow, "identity").apply(narrow.x), narrow.x[..., :3])
    padded = fit_map(wide, "identity").apply(wide.x)
    assert torch.equal(padded[..., :3], wide.x) and not padded[..., 3:].any()
    mean = fit_map(wide, "mean").apply(wide.x)
    torch.testing.assert_close(mean, wide.y.mean((0, 1)).expand_as(mean))


def test_anchors_recover_a_rotation_with_a_scale() -> None:
    x = torch.randn(200, 6) @ torch.diag(torch.linspace(0.5, 2, 6)) + 4
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    rows = PairedRows(x, 3 * x @ rotation.T + 1)
    found = affine(rows, "anchors", count=40)
    torch.testing.assert_close(found.weight, 3 * rotation, atol=1e-4, rtol=1e-4)
    few = affine(rows, "anchors", count=3)
    assert few.rank == 3 and few.card.settings["count"] == 3
    everything = affine(rows, "anchors", count=10_000)
    assert everything.card.settings["count"] == 200


def test_a_local_map_recovers_a_convolution() -> None:
    x = torch.randn(40, 3, 4, 5) + 2
    kernel, bias = torch.randn(2, 3, 3, 3), torch.randn(2)
    y = conv2d(x, kernel, bias, padding=1)
    rows = PairedRows(x.flatten(2).mT, y.flatten(2).mT)
    found = fit_map(rows, "local", grid=(4, 5), lambdas=0.0)
    assert isinstance(found, LocalMap)
    torch.testing.assert_close(found.weight, kernel, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.bias, bias, atol=1e-3, rtol=1e-3)
    chosen = fit_map(rows, "local", grid=(4, 5))
    assert score_map(chosen, rows).fvu < 1e-6 < score_map(fit_map(rows, "ridge"), rows).fvu


def test_a_noise_conditioned_map_recovers_its_formula() -> None:
    x, levels = torch.randn(300, 2, 4) + 1, torch.linspace(0.1, 10, 300).double()
    levels[0] = torch.inf  # pure noise is the noisiest that is finite
    s = ((levels.log() - np.log(10 * levels[1]) / 2) / (np.log(10 / levels[1]) / 2)).clamp(-1, 1)
    weight, bias = torch.randn(2, 3, 4), torch.randn(2, 3)
    own = s.float()[:, None, None]
    y = x @ weight[0].T + bias[0] + own * (x @ weight[1].T + bias[1])
    rows = PairedRows(x, y, levels=levels)
    found = fit_map(rows, "noise", lambdas=0.0)
    assert isinstance(found, NoiseConditionedMap) and found.degree == 1
    torch.testing.assert_close(found.weight, weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.bias, bias, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.apply(x, level=levels), y, atol=1e-3, rtol=1e-3)
    assert score_map(found, rows).fvu < 1e-6


def test_the_map_of_each_step_is_fitted_to_its_own_pairs() -> None:
    rows = draw(120)
    timed = PairedRows(
        rows.x, rows.y, steps=torch.arange(120) % 3 + 4, levels=3.0 - torch.arange(120) % 3
    )
    assert timed.steps is not None
    found = fit_map(timed, "steps", each="procrustes", scale=True)
    assert isinstance(found, StepMaps)
    assert (found.steps, found.levels) == ((4, 5, 6), (3.0, 2.0, 1.0))
    for step in (4, 5, 6):
        expected = affine(timed.select(timed.steps == step), "procrustes", scale=True)
        made = found.at(step)
        assert isinstance(made, AffineMap) and torch.equal(made.weight, expected.weight)
    assert found.card.method == "steps" and found.card.settings["each"] == "procrustes"
    validated = fit_map(timed, "steps", validation=timed)
    assert len({each["lambda"] for each in validated.card.settings["steps"]}) >= 1


FAST = Recipe(epochs=60, lr=1e-2, batch_size=32, validate_every=None)


def test_an_affine_map_by_gradients_comes_to_the_closed_form() -> None:
    x = torch.randn(200, 5) + 3
    rows = PairedRows(x, x @ torch.randn(5, 4) + 0.5 * torch.randn(200, 4) - 7)
    found = affine(rows, "affine", recipe=replace(FAST, epochs=200), progress=False)
    train, _ = rows.split()
    weight, bias = penalised(train, 0.0)
    assert fvu(train, found.weight.double().numpy(), found.bias.double().numpy()) == pytest.approx(
        fvu(train, weight, bias), rel=0.05
    )


def test_a_perceptron_beats_lines_where_there_is_a_bend() -> None:
    x = torch.randn(400, 3) + torch.tensor([1.0, 0.0, -1.0])
    rows = PairedRows(x, 5 + 2 * x.abs())
    train, held = rows.split()
    found = fit_map(train, "mlp", hidden=16, recipe=FAST, progress=False)
    assert isinstance(found, MLPMap) and found.hidden == 16
    ridge = fit_map(train, "ridge")
    assert score_map(found, held).fvu < 0.1 < 0.3 < score_map(ridge, held).fvu
    again = fit_map(train, "mlp", hidden=16, recipe=FAST, progress=False)
    assert again == found
    with pytest.warns(UserWarning, match="mlp: after 1 steps its FVU on held-out pairs is 1"):
        usual = fit_map(train, "mlp", recipe=Recipe(steps=1, validate_every=None), progress=False)
    assert isinstance(usual, MLPMap) and usual.hidden == 3
    part, kept = train.split()
    assert usual.card.settings["held_out_fvu"] == pytest.approx(
        score_map(usual, kept).fvu, rel=1e-4
    )
    assert len(part) + len(kept) == len(train)


def test_names_of_models_and_sites_are_on_the_card() -> None:
    rows = draw()
    named = PairedRows(rows.x, rows.y, source_site="a.mid", target_site="b.up")
    card = fit_map(named, "mean", source_model="a", target_model="b").card
    assert (card.source_site, card.target_site) == ("a.mid", "b.up")
    assert (card.source_model, card.target_model, card.method) == ("a", "b", "mean")


def test_fewer_pairs_than_dimensions() -> None:
    rows = draw(20, 30, 4)
    valid = "valid with .*ridge and reduced_rank with every lambda above 0"
    with pytest.raises(InvalidInput, match="20 pairs do not determine a map from 30.*" + valid):
        fit_map(rows, "ridge", lambdas=0.0)
    with pytest.raises(InvalidInput, match="reduced_rank: 20 pairs .*" + valid):
        fit_map(rows, "reduced_rank", rank=2, lambdas=0.0)
    square = draw(20, 30, 30)
    with pytest.raises(InvalidInput, match="procrustes: 20 pairs .* of rank 19, .*" + valid):
        fit_map(square, "procrustes")
    for method in ("ridge", "reduced_rank", "mean", "identity", "anchors"):
        fit_map(square, method)
    options: dict[str, Any] = {"recipe": FAST, "progress": False}
    for method in ("affine", "mlp"):
        assert fit_map(square, method, validation=square, **options).d_target == 30
    few = PairedRows(torch.randn(9, 4, 3), torch.randn(9, 4, 3), levels=torch.arange(9) + 1.0)
    with pytest.raises(
        InvalidInput, match="local: 36 pairs .* from 75 source dimensions.*" + valid
    ):
        fit_map(few, "local", k=5, lambdas=0.0)
    with pytest.raises(InvalidInput, match="noise: 36 pairs .* from 51 source dimens.*" + valid):
        fit_map(few, "noise", degree=12, lambdas=0.0)
    with pytest.raises(InvalidInput, match="^step 0: ridge: 3 pairs .*" + valid):
        timed = PairedRows(few.x[:, :3], few.y[:, :3], steps=torch.arange(9))
        fit_map(timed.select(slice(0, 1)), "steps", lambdas=0.0, validation=timed)


def test_a_covariance_without_full_rank() -> None:
    rows = draw()
    x = torch.cat([rows.x, rows.x[..., :1] + rows.x[..., 1:2]], 2)
    flat = PairedRows(x.double(), rows.y)
    rank = "the source covariance has rank 5 of 6, so lambda = 0 .* valid .*every lambda above 0"
    with pytest.raises(InvalidInput, match="ridge: " + rank):
        fit_map(flat, "ridge", lambdas=[0.0, 0.1])
    with pytest.raises(InvalidInput, match="reduced_rank: " + rank):
        fit_map(flat, "reduced_rank", lambdas=0.0)
    with pytest.raises(InvalidInput, match="procrustes: 200 pairs .* of rank 5, which leaves part"):
        fit_map(PairedRows(flat.x, flat.x), "procrustes")
    for method in ("ridge", "reduced_rank", "mean", "identity", "anchors"):
        fit_map(flat, method)
    with pytest.raises(InvalidInput, match="all source rows are equal"):
        fit_map(PairedRows(torch.ones(9, 3), torch.randn(9, 3)), "ridge")
    with pytest.raises(InvalidInput, match="target rows are all equal"):
        fit_map(PairedRows(torch.randn(9, 3), torch.ones(9, 3)), "ridge")


def test_bad_input() -> None:
    rows = draw()
    moments = rows.moments()
    with pytest.raises(UnknownName, match="method of maps 'ridgy'; nearest: ridge"):
        fit_map(rows, "ridgy")
    with pytest.raises(UnknownName, match="option of ridge 'lambda_'; nearest: lambdas"):
        fit_map(rows, "ridge", lambda_=1)
    with pytest.raises(InvalidInput, match="lambdas are numbers from 0, one or several, got -1"):
        fit_map(rows, "ridge", lambdas=-1)
    with pytest.raises(InvalidInput, match="it chooses on held-out pairs, which moments do not"):
        fit_map(moments, "ridge")
    with pytest.raises(InvalidInput, match="held out are 4 -> 5"):
        fit_map(rows, "ridge", validation=PairedRows(rows.y, rows.x))
    for method in ("anchors", "local", "noise", "mlp", "steps"):
        with pytest.raises(
            InvalidInput, match=f"{method}: it .*needs pairs of rows|{method}: it chooses"
        ):
            fit_map(moments, method)
    with pytest.raises(InvalidInput, match="ranks are from 1 to 4, got 5"):
        fit_map(rows, "reduced_rank", rank=5)
    with pytest.raises(InvalidInput, match="hidden is a whole number from 1, got 0"):
        fit_map(rows, "mlp", hidden=0)
    with pytest.raises(InvalidInput, match="k is odd and at least 1, got 2"):
        fit_map(rows, "local", k=2)
    with pytest.raises(InvalidInput, match="1 tokens are not those of a grid of 2 x 2"):
        fit_map(rows, "local", grid=(2, 2))
    with pytest.raises(InvalidInput, match="5 tokens are not those of a square grid"):
        fit_map(PairedRows(torch.randn(9, 5, 2), torch.randn(9, 5, 2)), "local")
    with pytest.raises(InvalidInput, match="the noise levels of these pairs are not known"):
        fit_map(rows, "noise")
    with pytest.raises(InvalidInput, match="all pairs have one noise level"):
        fit_map(PairedRows(rows.x, rows.y, levels=torch.ones(200)), "noise")
    with pytest.raises(InvalidInput, match="the steps of these pairs are not known"):
        fit_map(rows, "steps")
    few = PairedRows(rows.x, rows.y, steps=torch.arange(200).clamp(max=100))
    with pytest.raises(InvalidInput, match="^step 0: pairs: .* of 1 groups"):
        fit_map(few, "steps")
    with pytest.raises(InvalidInput, match="PairedRows or CrossMoments are needed, got Tensor"):
        fit_map(rows.x, "mean")  # pyright: ignore[reportArgumentType]
    sides: Any = (rows.x, rows.y)
    with pytest.raises(InvalidInput, match=r"got tuple; PairedRows\(x, y\) makes them of rows"):
        fit_map(sides, "mean")
    with pytest.raises(InvalidInput, match=r"got tuple; PairedRows\(x, y\) makes them of rows"):
        fit_map(rows, "ridge", validation=sides)
    bad = rows.x.clone()
    bad[2, 0, 0] = torch.nan
    for method in METHODS:
        if method not in ("local", "noise", "steps"):
            with pytest.raises(
                InvalidInput, match="1 of .* source rows are not finite.*no method takes them"
            ):
                fit_map(PairedRows(bad, rows.y), method)
    timed = {"steps": torch.arange(200) % 2, "levels": torch.arange(200) % 2 + 1.0}
    for method in ("local", "noise", "steps"):
        with pytest.raises(InvalidInput, match="source rows are not finite"):
            fit_map(PairedRows(bad, rows.y, **timed), method)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("ridge", {"lambdas": True}, "lambdas are numbers from 0, one or several, got True"),
        ("ridge", {"lambdas": None}, "lambdas are numbers from 0, one or several, got None"),
        ("ridge", {"lambdas": "0.1"}, "lambdas are numbers from 0, one or several, got '0.1'"),
        ("ridge", {"lambdas": [0.1, torch.inf]}, "lambdas are numbers from 0"),
        ("ridge", {"lambdas": []}, r"lambdas are numbers from 0, one or several, got \[\]"),
        ("procrustes", {"scale": 2.0}, "scale is True or False, .* got 2.0"),
        ("reduced_rank", {"rank": 2.0}, "a rank is a whole number from 1, got 2.0"),
        ("reduced_rank", {"rank": [1.5]}, "a rank is a whole number from 1, got 1.5"),
        ("reduced_rank", {"rank": True}, "a rank is a whole number from 1, got True"),
        ("reduced_rank", {"rank": []}, r"rank is a whole number from 1, or several, got \[\]"),
        ("reduced_rank", {"rank": 0}, "reduced_rank: a rank is a whole number from 1, got 0"),
        ("local", {"k": 4}, "k is odd and at least 1, got 4; nearest: 3 and 5"),
        ("steps", {"each": "local", "k": 4}, "local: k is odd and at least 1, got 4"),
        ("mlp", {"folder": 3}, "mlp: folder is a path, got 3"),
        ("anchors", {"count": 2.5}, "anchors: count is a whole number from 1, got 2.5"),
        ("anchors", {"rcond": 1.0}, "rcond is from 0 to below 1, got 1.0"),
        ("anchors", {"rcond": None}, "rcond is a number, got None"),
        ("local", {"k": 3.0}, "local: k is a whole number from 1, got 3.0"),
        ("local", {"grid": 3}, r"grid is \(height, width\), got 3"),
        ("local", {"grid": (1, 0.5)}, "height and width of grid is a whole number from 1, got 0.5"),
        ("noise", {"degree": 1.5}, "noise: degree is a whole number from 0, got 1.5"),
        ("mlp", {"hidden": 2.0}, "mlp: hidden is a whole number from 1, got 2.0"),
        (
            "affine",
            {"recipe": 3},
            "affine: recipe is a fitting.Recipe or a mapping of steps, .*got 3",
        ),
        ("affine", {"recipe": {"lr": "a"}}, "affine: recipe: train: lr must be positive, got 'a'"),
        ("ridge", {"seed": None}, "fit_map: seed is a whole number, got None"),
        ("ridge", {"share": "a"}, "fit_map: share is a number, got 'a'"),
        ("ridge", {"share": 1.5}, "fit_map: share is a number between 0 and 1, got 1.5"),
    ],
)
def test_options_that_cannot_be_right(method: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        fit_map(draw(), method, **options)
    with pytest.raises(InvalidInput, match=text):  # which needs no pairs
        check_options(method, options)


def test_options_as_methods_take_them() -> None:
    made = check_options("steps", {"each": "reduced_rank", "rank": 2, "lambdas": torch.tensor(0.5)})
    assert made == {"each": "reduced_rank", "rank": [2], "lambdas": [0.5]}
    assert check_options("local", {"grid": [2, 3]}) == {"grid": (2, 3)}
    recipe = check_options("mlp", {"recipe": {"epochs": 7}})["recipe"]
    assert (recipe.epochs, recipe.lr, recipe.batch_size) == (7, 1e-4, 64)
    for method, name, near in (
        ("mlp", "hiden", "hidden"),
        ("ridge", "validation", "lambdas"),
        ("steps", "eech", "each"),
    ):
        with pytest.raises(UnknownName, match=f"option of .* '{name}'; nearest: {near}"):
            check_options(method, {name: 1})
    with pytest.raises(UnknownName, match="field of a recipe 'epoch'; nearest: epochs"):
        check_options("mlp", {"recipe": {"epoch": 1}})


def test_the_seed_draws_anchors_too() -> None:
    rows = draw()
    one, other, again = (affine(rows, "anchors", count=3, seed=n) for n in (0, 1, 0))
    assert one == again != other


def test_a_step_has_one_noise_level() -> None:
    rows, steps = draw(), torch.arange(200) % 2
    levels = 1.0 + steps
    levels[1::4] = 5
    with pytest.raises(InvalidInput, match="^step 1: its pairs have noise levels from 2 to 5"):
        fit_map(PairedRows(rows.x, rows.y, steps=steps, levels=levels), "steps")
    levels[1::2] = torch.inf
    found = fit_map(PairedRows(rows.x, rows.y, steps=steps, levels=levels), "steps")
    assert isinstance(found, StepMaps) and found.levels == (1.0, torch.inf)


def test_held_out_pairs_that_do_not_fit_the_method() -> None:
    rows, steps = draw(), torch.arange(200) % 2
    timed = PairedRows(rows.x, rows.y, steps=steps, levels=1.0 + steps)
    with pytest.raises(InvalidInput, match="noise levels of the held-out pairs .* are not known"):
        fit_map(timed, "noise", validation=rows)
    with pytest.raises(InvalidInput, match="steps of the held-out pairs .* are not known"):
        fit_map(timed, "steps", validation=rows)
    with pytest.raises(InvalidInput, match="step 1: the held-out pairs .* have no such step"):
        fit_map(timed, "steps", validation=timed.select(timed.steps == 0))  # pyright: ignore
    grid = PairedRows(torch.randn(9, 4, 5), torch.randn(9, 4, 4))
    with pytest.raises(InvalidInput, match="1 tokens are not those of a grid of 2 x 2"):
        fit_map(grid, "local", validation=rows)
    padded = PairedRows(grid.x, grid.y, torch.ones(9, 4).index_fill(1, torch.tensor(3), 0))
    with pytest.raises(InvalidInput, match="sequences with padding have no grid"):
        fit_map(grid, "local", validation=padded)


def test_padding_has_no_grid() -> None:
    x = torch.randn(9, 4, 2)
    weights = torch.ones(9, 4)
    weights[0, 3] = 0
    with pytest.raises(InvalidInput, match="sequences with padding have no grid"):
        fit_map(PairedRows(x, x, weights), "local")


def test_nothing_is_drawn_from_the_generator_of_torch(reseeded: Any) -> None:
    rows = draw()

    def fits() -> list[Tensor]:
        found = []
        for method in ("ridge", "anchors", "mlp"):
            extra = {"recipe": FAST, "progress": False} if method == "mlp" else {}
            found.append(fit_map(rows, method, **extra).apply(rows.x))
        return found

    one, other = reseeded(fits)
    assert all(map(torch.equal, one, other))


def test_gradients_know_nothing_of_padding_and_go_on_from_a_folder(tmp_path: Path) -> None:
    rows = draw(90)
    weights = torch.ones(30, 3)
    weights[::2, 1:] = 0
    kept = weights.flatten() > 0
    x, y = rows.x.view(30, 3, 5).clone(), rows.y.view(30, 3, 4).clone()
    x[weights == 0], y[weights == 0] = torch.nan, torch.nan
    padded = PairedRows(x, y, weights)
    recipe = replace(FAST, epochs=40)
    options: dict[str, Any] = {"recipe": recipe, "progress": False}
    found = affine(padded, "affine", validation=padded, folder=tmp_path, **options)
    plain = PairedRows(rows.x[kept], rows.y[kept])
    expected = affine(plain, "affine", validation=plain, **options)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-4, rtol=1e-4)
    assert fit_map(padded, "affine", validation=padded, folder=tmp_path, **options) == found
    with pytest.raises(InvalidInput, match="holds a training with batches=.*use another folder"):
        fit_map(plain, "affine", validation=plain, folder=tmp_path, **options)
