"""Autoencoders carried through affine maps: the same latents on mapped rows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.sae import BatchTopK, JumpReLU, SparseAutoencoder, TopK, map_sae


def maps(d_source: int = 6, d_target: int = 6) -> tuple[Any, Any]:
    """There and back: exact where widths are equal, or of rows from there where it is wider."""
    weight, bias = torch.randn(d_target, d_source), torch.randn(d_target)
    back = torch.linalg.pinv(weight.double())
    return (
        SimpleNamespace(weight=weight, bias=bias),
        SimpleNamespace(weight=back, bias=-back @ bias.double()),
    )


def there(x: Tensor, forward: Any) -> Tensor:
    return x @ forward.weight.T + forward.bias


def fitted(selection: Any, **options: Any) -> SparseAutoencoder:
    """With biases, thresholds and, where there is one, a normalisation of its own."""
    sae = SparseAutoencoder(6, 24, selection, **options)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_()
    if options.get("normalise", "none") != "none":
        sae.fit_normalisation(2 + 3 * torch.randn(50, 6))
    if not isinstance(selection, TopK):
        sae.threshold = torch.rand(24)
    return sae.eval()


@pytest.mark.parametrize(
    ("selection", "options"),
    [
        (TopK(3), {}),
        (TopK(3), {"rescale": True, "normalise": "standardise"}),
        (BatchTopK(3), {"apply_b_dec_to_input": False, "normalise": "average_norm"}),
        (JumpReLU(), {"apply_b_dec_to_input": False}),
    ],
)
@pytest.mark.parametrize("d_target", [6, 9])
def test_mapped_rows_have_the_same_latents(selection: Any, options: Any, d_target: int) -> None:
    sae = fitted(selection, **options)
    forward, backward = maps(6, d_target)
    found, x = map_sae(sae, forward, backward), 2 + 3 * torch.randn(40, 6)
    assert (found.d_in, found.d_sae, found.training) == (d_target, 24, False)
    y = there(x, forward)
    codes = sae.encode(x)
    assert 0 < int((codes > 0).sum()) < codes.numel()
    torch.testing.assert_close(found.encode(y), codes, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found(y), there(sae(x), forward), atol=1e-2, rtol=1e-3)


def test_a_carried_autoencoder_can_be_trained() -> None:
    sae = fitted(BatchTopK(3)).train()
    assert sae.unit_decoder
    found = map_sae(sae, *maps())
    assert found.training and int(found.steps) == 0
    x = torch.randn(20, 6)
    before = found(x)
    found.constrain()  # as each step ends
    assert torch.equal(found(x), before)
    loss = found.loss(torch.randn(20, 6)).total
    loss.backward()
    assert found.W_enc.grad is not None and bool(found.W_enc.grad.any())


def test_what_cannot_be_carried() -> None:
    forward, backward = maps(6, 9)
    with pytest.raises(InvalidInput, match=r"needs forward \[6, 6\] and backward \[6, 6\], got"):
        map_sae(fitted(TopK(3)), backward, forward)
    layer = SparseAutoencoder(6, 24, TopK(3), normalise="layer_norm")
    with pytest.raises(InvalidInput, match="normalise='layer_norm' each row has its own scale"):
        map_sae(layer, forward, backward)
