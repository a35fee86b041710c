"""A threshold of inference from rows, in place of the one that followed training."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.sae.encoder import encode_budget
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import BatchTopK, SampledTopK
from dreamreader.sae.threshold import find_smallest


@torch.no_grad()
def calibrate_threshold(
    sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "rows d_in"]]
) -> None:
    """Sets the threshold at which k of all latents are active in a row on average.

    A pool of few columns keeps small activations in training, and a threshold that follows them
    keeps too many of all columns at inference.

    Formula: the mean over batches, each of the weight n of its rows, of the smallest of the
        round(k n) largest activations.

    Args:
        sae: of a selection with a budget for the batch, `BatchTopK` or `SampledTopK`.
        batches: rows [n, d_in], at least one batch.

    Raises:
        InvalidInput: the selection is another one, a batch is not [rows, d_in] or not finite, or
            nothing is active in any batch.

    Example:
        >>> sae = SparseAutoencoder(8, 32, SampledTopK(4, l=1.5))
        >>> calibrate_threshold(sae, [torch.randn(500, 8) for _ in range(8)])
        >>> 3.5 < sae.eval().encode_sparse(torch.randn(500, 8)).count() / 500 < 4.5
        tensor(True)
    """
    if not isinstance(sae.selection, BatchTopK | SampledTopK):
        raise InvalidInput(
            f"calibrate_threshold: thresholds are of BatchTopK and SampledTopK, not of "
            f"{sae.selection}"
        )
    found, sizes = [], []
    for number, x in enumerate(batches):
        if x.dim() != 2 or x.shape[1] != sae.d_in:
            raise InvalidInput(
                f"calibrate_threshold: batch {number} must be [rows, {sae.d_in}], got "
                f"{list(x.shape)}"
            )
        if not bool(x.isfinite().all()):
            raise InvalidInput(
                f"calibrate_threshold: batch {number} has values that are not finite"
            )
        rows, weight, bias = sae._encoder(sae._affine(x).apply(x.to(sae.W_dec)))
        smallest = find_smallest(encode_budget(rows, weight, bias, BatchTopK(sae.selection.k)))
        if smallest > 0:
            found.append(smallest)
            sizes.append(len(x))
    if not found:
        raise InvalidInput("calibrate_threshold: nothing is active in these batches")
    share = torch.tensor(sizes, dtype=torch.float32, device=found[0].device)
    sae.threshold = (torch.stack(found).float() @ share) / share.sum()
    sae.inference = "threshold"
