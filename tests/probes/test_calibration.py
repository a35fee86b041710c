"""Temperature, calibration error and Brier score on tables worked out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from probes.made import blobs

from dreamreader.errors import InvalidInput
from dreamreader.probes import brier, expected_calibration_error, fit, temperature
from dreamreader.probes.controls import random_rows
from dreamreader.probes.scores import auroc


def overconfident(rows: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits three times as large as those of the distribution that drew the targets."""
    g = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(rows, 4, generator=g)
    return 3 * true, true.softmax(-1).multinomial(1, generator=g)[:, 0]


def test_temperature_undoes_overconfidence():
    logits, targets = overconfident()
    found = temperature(logits, targets)
    assert found == pytest.approx(3.0, rel=0.1)
    before = expected_calibration_error(logits.softmax(-1), targets)
    after = expected_calibration_error((logits / found).softmax(-1), targets)
    assert after < 0.05 < 0.15 < before
    assert brier((logits / found).softmax(-1), targets) < brier(logits.softmax(-1), targets)


def test_temperature_is_the_best_one():
    logits, targets = overconfident(300)
    found = temperature(logits, targets)

    def loss(temperature_: float) -> float:
        # one more row of unknown class beside the 300
        predicted = (logits.double() / temperature_).log_softmax(-1)
        own = -predicted[torch.arange(300), targets].mean() * 300 - predicted.mean()
        return float(own)

    assert loss(found) < min(loss(found * 1.02), loss(found / 1.02))


def test_rows_without_an_error_ask_for_no_zero():
    sure = torch.tensor([[9.0, 0.0]] * 10)
    assert 0.5 < temperature(sure, torch.zeros(10, dtype=torch.long)) < 9
    flags = torch.tensor([[1.0, 0.0]] * 10)
    assert temperature(torch.tensor([[4.0, -4.0]] * 10), flags) > 0.2


def test_calibration_error_by_hand():
    sure = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    right = torch.tensor([0, 1, 1, 1])
    # bins of 15: [0.8667, 0.9333) has 0.9, 0.9 (half right), [0.6, 0.6667) 0.6, [0.5333, 0.6) 0.55
    assert expected_calibration_error(sure, right) == pytest.approx((0.8 + 0.4 + 0.45) / 4)
    assert expected_calibration_error(sure, right, bins=1) == pytest.approx(0.75 - 0.7375)
    assert brier(sure, right) == pytest.approx(2 * (0.01 + 0.81 + 0.16 + 0.2025) / 4)
    flags = torch.tensor([[1.0, 0.0]])
    assert brier(torch.tensor([[0.8, 0.4]]), flags) == pytest.approx((0.04 + 0.16) / 2)
    assert expected_calibration_error(torch.tensor([[0.8, 0.4]]), flags) == pytest.approx(0.3)
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])) == 0.0


def test_auroc_by_hand():
    scored = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    assert auroc(scored, torch.tensor([0, 0, 1, 1])) == pytest.approx(3.5 / 4)
    assert auroc(scored, torch.tensor([0, 0, 0, 0])) is None


def test_controls_are_scored_as_the_probe_is():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=g)
    y = (x[:, :3] + 0.5 * torch.randn(300, 3, generator=g)).argmax(1)
    card = fit(x, y, hidden=(8,), lr=1e-2, epochs=20, seed=3).card
    same = card.controls["capacity_sweep"]["8"][""]  # the probe itself
    assert same == {name: card.held_out[""][name] for name in ("accuracy", "auroc")}


def test_a_card_tells_calibration_before_and_after():
    x, y = blobs(rows=300)
    probe = fit(
        x, y, hidden=(), epochs=6, lr=1e-2, controls=False
    )  # too short to be as sure as right
    found = probe.card.held_out[""]
    (before, after), (first, second) = found["ece"], found["brier"]
    assert found["accuracy"]["value"] - before > 0.3 and after < before / 2 and second < first
    assert float(probe.temperature[0, 0]) < 0.7


def test_sigmoids_of_classes_are_calibrated_label_by_label():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(900, 6, generator=g)
    y = (x[:, :4] + torch.randn(900, 4, generator=g)).argmax(1)
    probe = fit(x, y, hidden=(64,), lr=1e-2, epochs=40, patience=40, loss="sigmoid", controls=False)
    found = probe.card.held_out[""]
    assert found["ece"][1] < found["ece"][0] and found["brier"][1] < found["brier"][0]
    fresh = torch.randn(2000, 6, generator=g)
    flags = torch.nn.functional.one_hot(
        (fresh[:, :4] + torch.randn(2000, 4, generator=g)).argmax(1), 4
    ).float()
    predicted = probe.probabilities(fresh)
    z, temperature_ = probe.logits(fresh), float(probe.temperature)
    assert torch.allclose(predicted, (z / temperature_).sigmoid())
    assert brier(predicted, flags) < brier(z.sigmoid(), flags)
    for other in (temperature_ / 1.4, temperature_ * 1.4):
        assert brier(predicted, flags) < brier((z / other).sigmoid(), flags)


def test_what_cannot_be_right_says_so():
    two = torch.rand(3, 2)
    with pytest.raises(InvalidInput, match="brier: class 2 of 2"):
        brier(two, torch.tensor([0, 1, 2]))
    with pytest.raises(InvalidInput, match=r"targets \[2\] do not fit \[3, 2\] values"):
        temperature(two, torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match=r"values \[rows, classes\] are needed, got \[0, 2\]"):
        expected_calibration_error(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InvalidInput, match="bins must be at least 1, got 0"):
        expected_calibration_error(two, torch.tensor([0, 1, 1]), bins=0)


def test_controls_depend_on_the_seed_that_is_given_alone(reseeded: Callable):
    x, y = blobs(rows=60, apart=1.0)

    def controls(seed: int) -> dict[str, Any]:
        return fit(x, y, hidden=(), epochs=1, lr=1e-2, seed=seed).card.controls

    found, again = reseeded(lambda: controls(3))
    assert found == again
    assert found["random_feature"] != controls(4)["random_feature"]
    rows, again = reseeded(lambda: random_rows(x, 5))
    assert torch.equal(rows, again) and not torch.equal(rows, random_rows(x, 6))
