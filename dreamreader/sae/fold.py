"""The same autoencoder on raw inputs: scales of decoder rows and of inputs go into the weights."""

import torch

from dreamreader.sae.inputs import PER_ROW
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.norms import row_norms


@torch.no_grad()
def fold(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy in float32 with the same codes, thresholds and reconstructions, without scales.

    Formula: with n_j = |W_dec_j| if `rescale`, and z = (x - m) s: W_enc <- s W_enc n,
        b_enc <- b_enc n, W_dec <- W_dec / (n s), b_dec <- b_dec / s + m; where b_dec is not taken
        from inputs also b_enc <- b_enc - m W_enc. Decoder rows come first: codes are in units of
        n, so that in this order thresholds stay.

    Args:
        sae: with any normalisation; what each row does to itself stays.

    Returns:
        A new autoencoder, in `eval()` mode where the old one is.

    Example:
        >>> from dreamreader.sae import TopK
        >>> sae = SparseAutoencoder(4, 16, TopK(2), rescale=True, normalise="average_norm")
        >>> x = torch.randn(9, 4)
        >>> sae.fit_normalisation(x)
        >>> torch.allclose(fold(sae)(x), sae(x), atol=1e-5)
        True
    """
    kept = {name: getattr(sae, name).detach().double() for name in ("W_enc", "b_enc", "W_dec")}
    w_enc, b_enc, w_dec = kept.values()
    b_dec = sae.b_dec.detach().double()
    if sae.rescale:
        norms = row_norms(w_dec)
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms.unsqueeze(1)
    if sae.normalise not in PER_ROW:
        shift, scale = sae.input_shift.double(), sae.input_scale.double()
        w_enc = w_enc * scale.unsqueeze(1)
        if not sae.apply_b_dec_to_input:
            b_enc = b_enc - shift @ w_enc
        w_dec, b_dec = w_dec / scale, b_dec / scale + shift
    options = sae.describe() | {
        "selection": sae.selection,
        "threshold_rule": sae.threshold_rule,
        "aux": sae.aux,
        "normalise": sae.normalise if sae.normalise in PER_ROW else "none",
        "rescale": False,
        "unit_decoder": False,
        "aligned": False,
    }
    made = SparseAutoencoder(**options, dtype=torch.float32, device=w_dec.device)
    made.set_tensors({"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec})
    same = ("thresholds", "threshold_mean", "tokens_since_fired", "steps", "pool", "pool_size")
    made.set_tensors({name: sae.get_buffer(name) for name in same})
    if sae.learns_thresholds:
        made.set_tensors({"log_threshold": sae.log_threshold.detach()})
    made.statistics = dict(sae.statistics)
    return made.train(sae.training)
