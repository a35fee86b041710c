"""How far an edit moves what a language model expects next."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.metrics.base import Column, Outputs, require_field

_BYTES = 2**26  # that float32 logits of one slice of positions may take, for each of both runs


@dataclass(frozen=True)
class NextTokenKl:
    """Divergence of the next token's distribution from that of the unedited model, in nats.

    Formula: mean over positions of sum_v p_v (log p_v - log q_v), p unedited and q edited

    Positions are those of the prompt; of stitches, the tokens that were paired. 0 is no change.

    Limits: an experiment runs the prompts once more without edits, and holds the logits of both
    runs of a batch in the dtype of the model.
    """

    name: ClassVar[str] = "next_token_kl"
    needs: ClassVar[frozenset[str]] = frozenset({"divergence"})
    compares: ClassVar[bool] = False

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        return {self.name: require_field(self.name, "divergence", got).double().tolist()}


def mean_divergence(
    native: Float[Tensor, "rows tokens vocabulary"],
    edited: Float[Tensor, "rows tokens vocabulary"],
    chosen: Bool[Tensor, "rows tokens"],
    slice_bytes: int = _BYTES,
) -> Float[Tensor, " rows"]:
    """Mean of KL(native || edited) over the chosen positions of each row, in nats.

    Args:
        native, edited: logits of both runs.
        chosen: positions; each row has some.
        slice_bytes: that logits of the positions computed together take in float32.

    Raises:
        InvalidInput: a row has no position.

    Example:
        >>> even, sure = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 100.0]]])
        >>> round(mean_divergence(sure, even, torch.tensor([[True]])).item(), 4)  # log 2
        0.6931
    """
    counts = chosen.sum(1)
    if not bool((counts > 0).all()):
        row = int((counts == 0).nonzero()[0])
        raise InvalidInput(f"next_token_kl: row {row} has no position that is compared")
    places = chosen.nonzero().to(native.device)
    total = torch.zeros(len(chosen), dtype=torch.float64, device=native.device)
    for part in places.split(max(1, slice_bytes // (4 * native.shape[2]))):
        row, token = part.unbind(1)
        p, q = (each[row, token].float().log_softmax(-1) for each in (native, edited))
        each = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)
        total.index_add_(0, row, each.double().clamp(min=0))  # below 0 by rounding alone
    return (total.cpu() / counts.cpu()).float()
