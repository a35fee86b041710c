"""How well a language model, edited as the row is, predicts a given text."""

from dataclasses import dataclass
from typing import ClassVar

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
