"""overcomplete: the state_dict of an autoencoder with the linear encoder, in one file.

The package itself saves whole modules, which run code when they are read; save `sae.state_dict()`.
The state holds neither k nor, for BatchTopKSAE, the threshold: both are given.

Reference:
    `sae/` of overcomplete 0.3.0.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sae.formats.files import assemble, check_tensors, read_pickle
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import BatchTopK, JumpReLU, Selection, TopK

NORMALIZATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")
_ENCODER = ("encoder.final_block.0.weight", "encoder.final_block.0.bias")
_DICTIONARY = ("dictionary._weights", "dictionary.multiplier")


def matches(path: Path) -> bool:
    return False  # a file of any name: it is asked for


def read(
    path: Path,
    *,
    k: float | None = None,
    threshold: float | None = None,
    normalization: str = "l2",
) -> SparseAutoencoder:
    """Reads the state_dict of an SAE, TopKSAE, BatchTopKSAE or JumpSAE.

    Args:
        path: the file.
        k: of TopKSAE (`top_k`); of BatchTopKSAE for each row, so `top_k` over the rows of a batch;
            None for SAE and JumpSAE.
        threshold: of BatchTopKSAE, its `running_threshold`.
        normalization: of the dictionary, as it was made with.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInput, UnknownName: another encoder, or keys or shapes that do not fit.
    """
    found = read_pickle(path)
    hidden = [name for name in found if name.startswith("encoder.") and name not in _ENCODER]
    if hidden:
        raise InvalidInput(f"{path}: only the linear encoder is read, this one has {hidden[0]}")
    check_tensors(path, found, (*_ENCODER, *_DICTIONARY), ("thresholds", "bandwidth"))
    weight = found[_ENCODER[0]]
    own = found.get("thresholds")
    if own is not None and (k is not None or threshold is not None):
        raise InvalidInput(
            f"{path} is a JumpSAE with thresholds of its own: give no k or threshold"
        )
    selection, least = _selection(k, threshold, own)
    decoder = _normalise_dictionary(found["dictionary._weights"], normalization)
    return assemble(
        path,
        {
            "W_enc": weight.T,
            "b_enc": found[_ENCODER[1]],
            "W_dec": decoder * found["dictionary.multiplier"].exp(),
            "b_dec": decoder.new_zeros(decoder.shape[-1]),
        },
        selection,
        least,
        apply_b_dec_to_input=False,
        unit_decoder=normalization == "l2",
    )


def _selection(
    k: float | None, threshold: float | None, own: Tensor | None
) -> tuple[Selection, Tensor | None]:
    """The selection, and thresholds: theirs keep what equals them, ours what is above."""
    given: Any = own.exp() if own is not None else threshold
    least = None
    if given is not None:
        least = torch.as_tensor(given, dtype=torch.float32)
        least = torch.nextafter(least, torch.full_like(least, -torch.inf))
    if k is None:
        return JumpReLU(), least
    if threshold is None:
        if k != int(k):
            raise InvalidInput(f"k={k} of a TopKSAE is whole; a BatchTopKSAE has a threshold=")
        return TopK(int(k)), None
    return BatchTopK(k), least


def _normalise_dictionary(weight: Tensor, kind: str) -> Tensor:
    """The dictionary as it is when the package evaluates."""
    if kind not in NORMALIZATIONS:
        raise UnknownName("normalization of a dictionary", kind, NORMALIZATIONS)
    if kind == "identity" or weight.dim() != 2:
        return weight
    lengths = weight.norm(dim=1) if "l2" in kind else weight.abs().sum(1)
    if kind.startswith("max"):
        return weight / lengths.max()
    return weight / (lengths + 1e-8).unsqueeze(1)
