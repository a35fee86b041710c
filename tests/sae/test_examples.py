"""What latents respond to, against dense codes of everything at once."""

import math

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.sae import SparseAutoencoder, TopK
from dreamreader.sae.examples import FeatureExamples

ROWS, STEPS, TOKENS, TOP = 11, 3, 9, 4


def activations() -> torch.Tensor:
    return torch.randn(ROWS, STEPS, TOKENS, 6, generator=torch.Generator().manual_seed(0))


def autoencoder() -> SparseAutoencoder:
    return SparseAutoencoder(6, 20, TopK(3), seed=1).eval()


@pytest.mark.parametrize("batch", [1, 4, ROWS])
@pytest.mark.parametrize("padded", [False, True])
def test_they_are_those_of_dense_codes_of_everything(batch: int, padded: bool):
    x, sae = activations(), autoencoder()
    padding = torch.zeros(ROWS, STEPS, TOKENS, dtype=torch.bool)
    if padded:
        padding[:, :, 7:] = True
        padding[3, :, 5:] = True
    colours = ["red", "blue", None, "red", "blue", "red", "red", "blue", "red", "blue", "red"]
    found = FeatureExamples(sae, top=TOP)
    for start in range(0, ROWS, batch):
        at = slice(start, start + batch)
        found.add_tensor(
            x[at], steps=[5, 6, 9], padding=padding[at], labels={"colour": colours[at]}
        )
    z = sae.encode(x).detach()
    z[padding] = 0
    best = z.amax((1, 2))  # [rows, latents]
    real = (~padding).sum((0, 2))
    torch.testing.assert_close(found.by_step.float(), z.sum((0, 2)).T / real, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.fired, (z > 0).sum((0, 1, 2)))
    assert torch.equal(found.frequency, found.fired / int((~padding).sum()))
    assert found.rows == ROWS and found.steps == (5, 6, 9)
    for latent in range(20):
        own = found.of(latent)
        want = [n for n in best[:, latent].argsort(descending=True).tolist() if best[n, latent] > 0]
        assert own.rows == want[:TOP]
        assert own.scores == pytest.approx(best[own.rows, latent].tolist())
        for row, heat in zip(own.rows, own.maps, strict=True):
            mean = z[row, :, :, latent].sum(0) / (~padding[row]).sum(0)  # NaN at padding
            torch.testing.assert_close(heat, mean, equal_nan=True, rtol=1e-5, atol=1e-6)
    labelled = [n for n, colour in enumerate(colours) if colour]
    red = torch.tensor([float(colours[n] == "red") for n in labelled])
    both = torch.stack([best[labelled, 2], red])
    correlation = float(found.correlations()["colour=red"][2])
    assert correlation == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-6)
    assert float(found.correlations()["colour=blue"][2]) == pytest.approx(-correlation)


def test_plain_vectors_have_examples_too():
    x = activations()
    vectors = torch.eye(6)[:2]
    found = FeatureExamples(vectors, top=2)
    found.add_tensor(x)
    want = x[..., 1].clamp(min=0).amax((1, 2)).topk(2)
    assert found.of(1).rows == want.indices.tolist()
    assert found.of(1).scores == pytest.approx(want.values.tolist())


def test_latents_that_never_fire_have_none():
    found = FeatureExamples(torch.eye(6)[:1], top=2)
    found.add_tensor(-activations().abs())
    assert found.of(0).rows == [] and int(found.fired[0]) == 0
    found.add_tensor(-activations().abs(), labels={"shape": ["star"] * ROWS})
    assert math.isnan(float(found.correlations()["shape=star"][0]))


def test_what_cannot_be_added_is_refused():
    with pytest.raises(InvalidInput, match="top must be at least 1, got 0"):
        FeatureExamples(autoencoder(), top=0)
    found = FeatureExamples(autoencoder())
    with pytest.raises(InvalidInput, match="nothing was added"):
        found.by_step  # noqa: B018
    found.add_tensor(activations(), steps=[0, 1, 2])
    with pytest.raises(InvalidInput, match=r"of steps \(0, 1, 2\), then of \(0, 1, 3\)"):
        found.add_tensor(activations(), steps=[0, 1, 3])
    with pytest.raises(InvalidInput, match="colour has 2 labels for 11 rows"):
        found.add_tensor(activations(), steps=[0, 1, 2], labels={"colour": ["red", "blue"]})
    before = found.tokens, found.rows
    with pytest.raises(InvalidInput, match="colour has 1 labels"):
        found.add_tensor(activations(), steps=[0, 1, 2], labels={"colour": ["red"]})
    assert (found.tokens, found.rows) == before
    with pytest.raises(InvalidInput, match="codes would depend on the batch; call sae.eval"):
        FeatureExamples(autoencoder().train())
    with pytest.raises(InvalidInput, match="latent 20 of 20 is none"):
        found.of(20)
