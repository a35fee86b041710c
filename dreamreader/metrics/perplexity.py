"""How well a language model, edited as the row is, predicts a given text."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.metrics.base import Column, Outputs, require_field


@dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean surprisal of the text's tokens: what an edit costs on text it is not for.

    Args:
        text: column of the rows with the text, of two tokens or more.

    Limits: an experiment runs the model on this text once more, with the edits of the row.
    """

    text: str = "plain_text"

    name: ClassVar[str] = "perplexity"
    needs: ClassVar[frozenset[str]] = frozenset({"surprisal"})
    compares: ClassVar[bool] = False

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        return {self.name: require_field(self.name, "surprisal", got).double().exp().tolist()}


def mean_surprisal(
    logits: Float[Tensor, "rows tokens vocabulary"],
    input_ids: Int[Tensor, "rows tokens"],
    attention_mask: Int[Tensor, "rows tokens"],
) -> Float[Tensor, " rows"]:
    """Mean of -log p (natural) over the tokens behind each row's first, padding left out.

    Raises:
        InvalidInput: a text has fewer than two tokens.
    """
    shown = logits[:, :-1].float().log_softmax(-1)
    each = -shown.gather(2, input_ids[:, 1:, None]).squeeze(2)  # [rows, tokens - 1]
    known = (attention_mask[:, :-1] * attention_mask[:, 1:]).bool()
    if not bool(known.any(1).all()):
        raise InvalidInput("perplexity: a text must have two tokens or more")
    return torch.where(known, each, 0).sum(1).cpu() / known.sum(1).cpu()
