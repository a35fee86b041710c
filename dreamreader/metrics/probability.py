"""How probable a language model finds the answer."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dreamreader.metrics.answers import answer_logits
from dreamreader.metrics.base import Column, Outputs, require_field


@dataclass(frozen=True)
class Probability:
    """`softmax(logits)[answer]` at the last position of the prompt, in float64.

    Args:
        answer: column of the rows, with text of one token, or the token's number.
    """

    answer: str = "answer"

    name: ClassVar[str] = "probability"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    compares: ClassVar[bool] = False

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        chosen = answer_logits(self.name, got, self.answer)
        logits = require_field(self.name, "logits", got).detach().to("cpu", torch.float64)
        return {self.name: (chosen - logits.logsumexp(1)).exp().tolist()}
