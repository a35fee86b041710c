"""An autoencoder of one model's activations as one of another's, through affine maps."""

from typing import Any, Protocol

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.sae.fold import fold
from dreamreader.sae.inputs import PER_ROW
from dreamreader.sae.model import SparseAutoencoder


class LinearMap(Protocol):
    """y = W x + b, such as an `AffineMap`."""

    @property
    def weight(self) -> Tensor: ...  # [d_out, d_in]

    @property
    def bias(self) -> Tensor: ...  # [d_out]


@torch.no_grad()
def map_sae(sae: SparseAutoencoder, forward: LinearMap, backward: LinearMap) -> SparseAutoencoder:
    """An autoencoder of the target that has the latents of one of the source.

    Formula: with x = G y + g (`backward`) and y = F x + f (`forward`), of weights as `fold` gives
        them: W_dec <- W_dec F', b_dec' = F b_dec + f, W_enc <- G' W_enc and
        b_enc <- b_enc + (g + G b_dec' - b_dec) W_enc, which stays near b_enc where G undoes F (g
        alone where b_dec is not taken from inputs). Thresholds are in units of codes and stay.
        Where G is the inverse of F, the codes of y are those of G y, and the reconstruction is F
        applied to theirs.

    Args:
        sae: of the source. forward: from source to target, for the decoder.
        backward: from target to source, for the encoder: its inverse, or fitted on its own.

    Returns:
        A new autoencoder in float32, in `eval()` mode where the old one is; as a beginning of
        training too, with counters at 0. Its decoder rows have the lengths that the map gives them,
        so it is neither `unit_decoder` nor `aligned`: a step of training would change what it is.
        Train it with `center=False`, as its b_dec is one already.

    Raises:
        InvalidInput: widths do not fit, or each row is normalised by itself, which no affine map
            carries.

    Example:
        >>> from types import SimpleNamespace
        >>> from dreamreader.sae import TopK
        >>> sae = SparseAutoencoder(4, 16, TopK(2))
        >>> turn = torch.linalg.qr(torch.randn(4, 4))[0]
        >>> there = SimpleNamespace(weight=turn, bias=torch.ones(4))
        >>> back = SimpleNamespace(weight=turn.T, bias=-turn.T @ torch.ones(4))
        >>> x = torch.randn(9, 4)
        >>> y = x @ turn.T + 1
        >>> torch.allclose(map_sae(sae, there, back).encode(y), sae.encode(x), atol=1e-5)
        True

    Reference:
        Chen et al., Transferring features across language models with model stitching,
        arXiv:2506.06609.
    """
    if sae.normalise in PER_ROW:
        raise InvalidInput(
            f"map_sae: with normalise={sae.normalise!r} each row has its own scale, which an "
            "affine map does not carry"
        )
    d_in = sae.d_in
    there, back = (
        [each.detach().double().to(sae.W_dec.device) for each in (one.weight, one.bias)]
        for one in (forward, backward)
    )
    d_new = len(there[0])
    if tuple(there[0].shape) != (d_new, d_in) or tuple(back[0].shape) != (d_in, d_new):
        raise InvalidInput(
            f"map_sae: an autoencoder of {d_in} features needs forward [{d_new}, {d_in}] and "
            f"backward [{d_in}, {d_new}], got {list(there[0].shape)} and {list(back[0].shape)}"
        )
    plain = fold(sae)
    w_enc, b_enc, w_dec, b_dec = (
        getattr(plain, name).detach().double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    centre, origin = there[0] @ b_dec + there[1], back[1]
    if plain.apply_b_dec_to_input:
        origin = origin + back[0] @ centre - b_dec
    options: dict[str, Any] = plain.describe() | {
        "d_in": d_new,
        "selection": plain.selection,
        "threshold_rule": plain.threshold_rule,
        "aux": plain.aux,
        "unit_decoder": False,
        "aligned": False,
        "reshape": "none",
    }
    made = SparseAutoencoder(**options, dtype=torch.float32, device=w_dec.device)
    made.set_tensors(
        {
            "W_enc": back[0].T @ w_enc,
            "b_enc": b_enc + origin @ w_enc,
            "W_dec": w_dec @ there[0].T,
            "b_dec": centre,
        }
    )
    for name in ("thresholds", "threshold_mean", "pool", "pool_size"):
        made.set_tensors({name: plain.get_buffer(name)})
    if plain.learns_thresholds:
        made.set_tensors({"log_threshold": plain.log_threshold.detach()})
    return made.train(sae.training)
