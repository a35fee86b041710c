"""How much more a language model expects the right answer than the wrong one."""

from dataclasses import dataclass
from typing import ClassVar

from dreamreader.metrics.answers import answer_logits
from dreamreader.metrics.base import Column, Outputs


@dataclass(frozen=True)
class LogitDifference:
    """`logit(answer) - logit(wrong_answer)` at the last position of the prompt.

    Args:
        answer, wrong: columns of the rows, with text of one token each, or the token's number.
    """

    answer: str = "answer"
    wrong: str = "wrong_answer"

    name: ClassVar[str] = "logit_difference"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    compares: ClassVar[bool] = False

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        right, wrong = (answer_logits(self.name, got, each) for each in (self.answer, self.wrong))
        return {self.name: (right - wrong).tolist()}
