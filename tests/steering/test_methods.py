"""Each method on rows whose answer is known."""

import numpy as np
import pytest
import torch
from steering.recorded import cosine, gaussian

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering import Fitter, fit, fit_pairs
from dreamreader.steering.methods import oas


def vector(x, labels, method, **options):
    return fit({"s": x}, labels, "red", "blue", method, **options)["s"]


def test_mean_is_the_difference_and_caa_its_unit():
    x, labels, _, _ = gaussian(80, 6)
    blue = torch.tensor([label == "blue" for label in labels])
    expected = x[blue].mean(0) - x[~blue].mean(0)
    found = vector(x, labels, "mean", holdout=0)
    torch.testing.assert_close(found, expected.float())
    unit = vector(x, labels, "caa", holdout=0)
    torch.testing.assert_close(unit, (expected / expected.norm()).float())


@pytest.mark.parametrize("keep", ["covariance", "rows"])
def test_lda_recovers_the_inverse_covariance_times_the_difference(keep):
    x, labels, delta, covariance = gaussian(40_000, 8)
    fitter = Fitter(keep=keep)
    fitter.add({"s": x}, labels)
    found = fitter.fit("red", "blue", "lda")["s"]
    best = torch.linalg.solve(covariance, delta)
    assert cosine(found, best) > 0.998
    assert (
        cosine(fitter.fit("red", "blue", "mean")["s"], best) < 0.9
    )  # the task is not a trivial one


def test_lda_is_the_closed_form_of_numpy():
    x, labels, _, _ = gaussian(50, 6)
    blue = np.array([label == "blue" for label in labels])
    parts = [x.numpy()[~blue], x.numpy()[blue]]
    within = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in parts) / 50
    shrunk = 0.7 * within + 0.3 * np.trace(within) / 6 * np.eye(6)
    expected = np.linalg.solve(shrunk, parts[1].mean(0) - parts[0].mean(0))
    found = vector(x, labels, "lda", holdout=0, shrinkage=0.3, norm="none")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    whole = vector(x, labels, "lda", holdout=0, shrinkage=1.0)
    assert cosine(whole, vector(x, labels, "mean", holdout=0)) > 1 - 1e-6


def test_shrinkage_from_the_data_falls_with_rows_and_is_whole_for_a_sphere():
    x = torch.randn(20_000, 10, dtype=torch.float64) * torch.linspace(1, 4, 10)
    shares = [oas(torch.cov(x[:n].T, correction=0), n) for n in (12, 100, 20_000)]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    # d = 2, n = 10: (0 * 10 + 16) / (10 * (10 - 16 / 2))
    assert oas(torch.diag(torch.tensor([1.0, 3.0])), 10) == pytest.approx(0.8)
    # d = 4, n = 9: (30 / 2 + 100) / (9.5 * (30 - 100 / 4))
    assert oas(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), 9) == pytest.approx(1.0)
    assert oas(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), 99) == pytest.approx(115 / 497.5)
    assert shares[2] < 0.01 and oas(torch.eye(5, dtype=torch.float64), 10) == 1.0
    # With fewer rows than features the plain covariance has no inverse.
    few, labels, _, _ = gaussian(10, 30)
    assert bool(vector(few, labels, "lda", holdout=0).isfinite().all())
    with pytest.raises(
        InvalidInput, match="10 rows over 30 features has no inverse at shrinkage 0"
    ):
        vector(few, labels, "lda", holdout=0, shrinkage=0.0)


@pytest.mark.parametrize("keep", ["covariance", "rows"])
@pytest.mark.parametrize("features", [5, 90])
def test_pca_is_the_first_component_with_its_sign_to_the_target(keep, features):
    x, labels, _, _ = gaussian(60, features)
    fitter = Fitter(keep=keep, holdout=0)
    fitter.add({"s": x}, labels)
    found = fitter.fit("red", "blue", "pca")["s"].double()
    _, _, components = np.linalg.svd((x - x.mean(0)).numpy())
    assert abs(cosine(found, torch.tensor(components[0]))) > 1 - 1e-6
    assert float(found.norm()) == pytest.approx(1, abs=1e-6)
    assert float(found @ fitter.fit("red", "blue")["s"].double()) > 0
    assert torch.equal(fitter.fit("blue", "red", "pca")["s"].double(), -found)


@pytest.mark.parametrize("keep", ["covariance", "rows"])
@pytest.mark.parametrize("features", [5, 90])
def test_pca_of_pairs_is_the_first_component_of_their_differences(keep, features):
    base = torch.randn(40, features) * 10  # what the pairs have in common, and no direction
    change = torch.randn(features) * torch.randn(40, 1).abs() + 0.1 * torch.randn(40, features)
    fitter = Fitter(keep=keep, holdout=0)
    fitter.add_pairs({"s": base[:15]}, {"s": (base + change)[:15]})
    fitter.add_pairs({"s": base[15:]}, {"s": (base + change)[15:]})
    found = fitter.fit(method="pca")["s"]
    _, _, components = np.linalg.svd((base + change - base).double().numpy())
    assert abs(cosine(found, torch.tensor(components[0]))) > 1 - 1e-5
    assert cosine(found, change.mean(0)) > 0
    assert torch.equal(fitter.fit("target", "source", "pca")["s"], -found)


def test_the_logistic_weight_solves_its_problem():
    x, labels, _, _ = gaussian(60, 4)
    x[:, 2] = 7.0  # a feature that does not vary gets no weight
    found = vector(x, labels, "logistic", holdout=0, norm="none", l2=0.5).double()
    y = torch.tensor([1.0 if label == "blue" else -1.0 for label in labels], dtype=torch.float64)
    deviation = x.std(0, correction=0)
    z = (x - x.mean(0)) / deviation.clamp(min=1e-3)
    u = (found * deviation).requires_grad_()
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss():
        return torch.nn.functional.softplus(-y * (z @ u + b)).sum() + 0.25 * u.square().sum()

    for _ in range(200):  # the offset is not part of the result
        (slope,) = torch.autograd.grad(loss(), b)
        b = (b - 0.05 * slope).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(), u)
    assert found[2] == 0
    assert float(gradient.abs().max()) < 1e-4
    weaker = vector(x, labels, "logistic", holdout=0, norm="none", l2=500.0)
    assert float(weaker.norm()) < 0.1 * float(found.norm())


def test_the_logistic_weight_nears_that_of_the_gaussian_problem():
    x, labels, delta, covariance = gaussian(20_000, 6, apart=0.2)
    found = vector(x, labels, "logistic")
    assert cosine(found, torch.linalg.solve(covariance, delta)) > 0.995


@pytest.mark.parametrize("method", ["mean", "caa", "pca", "lda", "logistic"])
def test_norms(method):
    x = torch.randn(40, 2, 9, 6)
    labels = ["red", "blue"] * 20
    plain, channel, tensor = (
        fit({"s": x}, labels, "red", "blue", method, norm=norm)["s"]
        for norm in ("none", "channel", "tensor")
    )
    torch.testing.assert_close(channel.norm(dim=1), torch.ones(2))
    repeated = tensor[:, None].expand(2, 9, 6)  # at each of the recorded tokens
    torch.testing.assert_close(repeated.flatten(1).norm(dim=1), torch.ones(2))
    assert cosine(plain[1], channel[1]) > 1 - 1e-6


@pytest.mark.parametrize("method", ["mean", "caa", "pca", "lda", "logistic"])
def test_fitting_in_inference_mode_and_of_half_precision(method):
    x, labels, _, _ = gaussian(60, 4)
    half = x.to(torch.bfloat16)
    with torch.inference_mode():
        found = vector(half, labels, method)
    torch.testing.assert_close(found, vector(half.double(), labels, method))
    assert found.dtype == torch.float32


def test_labels_that_do_not_differ_give_zeros_not_nan():
    x = torch.ones(8, 3)
    for method in ("mean", "caa", "pca", "logistic"):
        assert torch.equal(vector(x, ["red", "blue"] * 4, method), torch.zeros(3))
    with pytest.raises(InvalidInput, match="s: lda: rows of a label do not differ"):
        vector(x, ["red", "blue"] * 4, "lda")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "ldb"}, UnknownName, "unknown method 'ldb'; nearest: lda"),
        ({"norm": "channels"}, UnknownName, "unknown norm 'channels'; nearest: channel"),
        ({"shrinkage": 1.5}, InvalidInput, "shrinkage must be from 0 to 1, got 1.5"),
        ({"l2": 0.0}, InvalidInput, "l2 must be above 0 and finite, got 0.0"),
        ({"target": "red"}, InvalidInput, "source and target are both 'red'"),
        ({"target": "blau"}, UnknownName, "unknown label 'blau'; nearest: blue"),
    ],
)
def test_wrong_options_say_what_is_wrong(options, error, text):
    fitter = Fitter(keep="rows")
    fitter.add({"s": torch.randn(8, 3)}, ["red", "blue"] * 4)
    with pytest.raises(error, match=text):
        fitter.fit(**{"source": "red", "target": "blue", "method": "lda", **options})


@pytest.mark.parametrize(("method", "needed"), [("lda", "covariance"), ("logistic", "rows")])
def test_a_method_names_what_it_needs(method, needed):
    fitter = Fitter()
    fitter.add_pairs({"s": torch.randn(8, 3)}, {"s": torch.randn(8, 3)})
    with pytest.raises(InvalidInput, match=rf"method '{method}' needs Fitter\(keep='{needed}'\)"):
        fitter.fit(method=method)
    assert fit_pairs({"s": torch.randn(8, 3)}, {"s": torch.randn(8, 3)}, method)["s"].shape == (3,)
