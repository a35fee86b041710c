"""JumpReLU thresholds that learn, beside the paper's formulas written out."""

import copy
from typing import Any

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.sae import AuxK, JumpReLU, SparseAutoencoder, TopK, fold, train_sae

WIDTH, WEIGHT = 0.3, 0.05


def made(**options: Any) -> SparseAutoencoder:
    selection = JumpReLU(sparsity=WEIGHT, bandwidth=WIDTH, start=0.5)
    sae = SparseAutoencoder(6, 16, selection, seed=1, aux="none", dtype=torch.float64, **options)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.2, 0.2, 6))
        sae.log_threshold.add_(torch.linspace(-0.5, 0.5, 16))
    return sae.train()


def by_hand(sae: SparseAutoencoder, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss, and gradients of the encoder's bias, decoder and log thresholds, without autograd."""
    t = sae.log_threshold.detach().exp().double()
    w_enc, w_dec = sae.W_enc.detach(), sae.W_dec.detach()
    z = (x - sae.b_dec.detach()) @ w_enc + sae.b_enc.detach()
    active = (z > t).double()
    codes = z * active
    error = codes @ w_dec + sae.b_dec.detach() - x
    loss = error.square().sum(1).mean() + WEIGHT * active.sum(1).mean()
    of_codes = 2 / len(x) * error @ w_dec.T
    rectangle = ((z - t).abs() < WIDTH / 2).double()
    of_t = (-(t / WIDTH) * rectangle * of_codes).sum(0)
    of_t += (-(1 / WIDTH) * rectangle * WEIGHT / len(x)).sum(0)
    return {
        "loss": loss,
        "b_enc": (of_codes * active).sum(0),
        "W_dec": 2 / len(x) * codes.T @ error,
        "log_threshold": of_t * t,
        "l0": active.sum(1).mean(),
        "fired": active.any(0),
    }


def test_loss_and_gradients_are_the_papers() -> None:
    sae, x = made(), torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    found = sae.loss(x)
    found.total.backward()
    want = by_hand(sae, x)
    assert found.total.item() == pytest.approx(want["loss"].item(), rel=1e-6)
    for name in ("b_enc", "W_dec", "log_threshold"):
        gradient = getattr(sae, name).grad.double()
        assert torch.allclose(gradient, want[name], rtol=1e-4, atol=1e-7), name
    below = want["log_threshold"] != 0
    assert below.any() and float(found.l0) == pytest.approx(float(want["l0"]))
    assert torch.equal(found.fired, want["fired"].bool())
    assert found.penalty is not None and found.penalty.item() == pytest.approx(
        WEIGHT * want["l0"].item()
    )


def test_training_makes_codes_sparser_and_inference_uses_what_it_learned(tmp_path) -> None:
    rows = list(torch.randn(20, 64, 6, generator=torch.Generator().manual_seed(1)))
    counts = {}
    for weight in (1e-4, 3.0):
        selection = JumpReLU(sparsity=weight, bandwidth=0.2, start=0.1, warmup=10)
        sae = SparseAutoencoder(6, 24, selection, seed=0, aux="none")
        train_sae(sae, rows, epochs=40, lr=0.05, progress=False)
        assert torch.equal(sae.thresholds, sae.log_threshold.detach().exp())
        assert not torch.allclose(sae.thresholds, torch.tensor(0.1))
        codes = sae.encode(rows[0])
        pre = (rows[0] - sae.b_dec) @ sae.W_enc + sae.b_enc
        assert torch.equal(codes != 0, pre > sae.thresholds)
        counts[weight] = float((codes != 0).sum(1).float().mean())
    assert counts[3.0] < 0.2 * counts[1e-4]
    sae.save(tmp_path / "sae.safetensors")
    again = SparseAutoencoder.load(tmp_path / "sae.safetensors")
    assert again.selection == sae.selection and torch.equal(again(rows[0]), sae(rows[0]))


def test_dead_latents_learn_whether_thresholds_do_or_not() -> None:
    x, found = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), []
    for selection in (JumpReLU(sparsity=WEIGHT), JumpReLU()):
        sae = SparseAutoencoder(6, 16, selection, seed=1, aux=AuxK(dead_after=1, lagged=True))
        sae.threshold = 0.5
        sae.tokens_since_fired[:5] = 2
        loss = sae.train().loss(x)
        loss.total.backward()
        assert loss.aux > 0 and sae.W_enc.grad is not None
        found.append(loss.aux)
    assert torch.equal(*found)


def test_thresholds_stay_without_sparsity() -> None:
    sae = SparseAutoencoder(6, 16, JumpReLU(), seed=0)
    assert not sae.learns_thresholds and not hasattr(sae, "log_threshold")
    sae.threshold = 0.3
    before = sae.thresholds.clone()
    train_sae(sae, list(torch.randn(4, 32, 6)), epochs=1, lr=0.01, progress=False)
    assert torch.equal(sae.thresholds, before)


def test_the_weight_rises_and_a_set_threshold_is_where_learning_goes_on() -> None:
    selection = JumpReLU(sparsity=2.0, warmup=4)
    assert [selection.weight(step) for step in (0, 1, 3, 9)] == [0.5, 1.0, 2.0, 2.0]
    sae = made()
    other = copy.deepcopy(sae)
    other.threshold = 0.25
    assert torch.allclose(other.log_threshold.exp(), torch.tensor(0.25))
    assert torch.equal(other.thresholds, torch.full((16,), 0.25))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 0.0}, "sparsity is a positive number"),
        ({"sparsity": float("nan")}, "sparsity is a positive number"),
        ({"bandwidth": -1.0}, "bandwidth is a positive number"),
        ({"start": 0}, "start is a positive number"),
        ({"warmup": -1}, "warmup is a number of steps"),
    ],
)
def test_values_that_cannot_be_right(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        JumpReLU(**options)


def test_folding_casting_and_other_selections_keep_what_was_learned() -> None:
    sae = SparseAutoencoder(6, 16, JumpReLU(sparsity=0.1), normalise="average_norm", seed=0)
    sae.fit_normalisation(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    sae.threshold = 0.3
    folded = fold(sae)
    assert torch.equal(folded.log_threshold, sae.log_threshold)
    half = copy.deepcopy(sae).bfloat16()
    assert half.W_dec.dtype == torch.bfloat16
    assert half.log_threshold.dtype == torch.float32
    assert torch.equal(half.log_threshold, sae.log_threshold)
    with pytest.raises(InvalidInput, match=r"learn from its own selection, not from TopK\(k=2\)"):
        sae.loss(torch.randn(4, 6), selection=TopK(2))
    with pytest.raises(InvalidInput, match="JumpReLU has none"):
        train_sae(sae, [torch.randn(8, 6)], epochs=1, k_start=4, k_steps=2, progress=False)
