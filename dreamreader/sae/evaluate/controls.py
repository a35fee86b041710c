"""What measures give where there is nothing to find: random halves and shuffled data."""

import copy
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.sae.evaluate.coder import Coder

Sae = TypeVar("Sae", bound=Coder)


def with_random_decoder(sae: Sae, seed: int = 0) -> Sae:
    """A copy whose decoder rows point anywhere, as long as before, and do not learn.

    Give it a fresh autoencoder and train the copy as the other was trained: what it reaches needs
    no learned directions. Of a trained one it says what its codes are worth without its decoder.

    Reference:
        Korznikov et al., Sanity checks for sparse autoencoders, arXiv:2602.14111.
    """
    found = copy.deepcopy(sae)
    _randomise(found.W_dec, seed)
    found.W_dec.requires_grad_(False)
    return found


def with_random_encoder(sae: Sae, seed: int = 0) -> Sae:
    """A copy whose encoder columns point anywhere, as long as before, and do not learn.

    Thresholds fitted to the old encoder stay as they are: fit them anew, or let the selection keep.
    """
    found = copy.deepcopy(sae)
    encoder: Tensor = found.W_enc  # pyright: ignore[reportAttributeAccessIssue]
    _randomise(encoder.T, seed)
    encoder.requires_grad_(False)
    return found


def shuffle_features(
    batches: Iterable[Float[Tensor, "rows d_in"]], seed: int = 0
) -> Iterator[Float[Tensor, "rows d_in"]]:
    """Batches in which every feature is dealt anew over the rows, apart from the others.

    Each feature keeps its distribution within a batch; what features have in common is gone.
    """
    generator = torch.Generator().manual_seed(seed)
    for x in batches:
        order = torch.rand(x.shape, generator=generator).argsort(0).to(x.device)
        yield x.gather(0, order)


@torch.no_grad()
def _randomise(rows: Tensor, seed: int) -> None:
    # not the numbers that an autoencoder of the same seed begins with
    generator = torch.Generator().manual_seed(seed + 2**31)
    drawn = torch.randn(rows.shape, generator=generator).to(rows)
    length = rows.norm(dim=1, keepdim=True)
    rows.copy_(drawn / drawn.norm(dim=1, keepdim=True) * length)
