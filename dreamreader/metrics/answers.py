"""Answers of a language model as single tokens."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.metrics.base import Outputs, require_field


def answer_logits(metric: str, got: Outputs, column: str) -> Float[Tensor, " n"]:
    """The logit of each row's answer, in float64.

    Args:
        column: of the rows; the answer as text of exactly one token, or as the token's number.

    Raises:
        InvalidInput: answers are missing or are not one token; names them.
    """
    logits = require_field(metric, "logits", got)
    ids = answer_ids(metric, got, column, logits.shape[1])
    rows = torch.arange(len(ids))
    return logits.detach().to("cpu", torch.float64)[rows, torch.tensor(ids, dtype=torch.long)]


def answer_ids(metric: str, got: Outputs, column: str, vocabulary: int) -> list[int]:
    """Token numbers of each row's answer; see `answer_logits`."""
    known: dict[Any, list[int]] = {}
    for row, answer in enumerate(got.column(column)):
        if answer is None:
            raise InvalidInput(f"{metric}: row {row} has no {column!r}")
        if answer not in known:
            known[answer] = _tokens(metric, got, answer)
    wrong = [each for each, tokens in known.items() if len(tokens) != 1]
    if wrong:
        listed = ", ".join(_describe(got, each, known[each]) for each in wrong)
        raise InvalidInput(f"{metric}: each {column} must be one token; {listed}")
    found = [known[answer][0] for answer in got.column(column)]
    beyond = [each for each in found if not 0 <= each < vocabulary]
    if beyond:
        raise InvalidInput(f"{metric}: token {beyond[0]} is not among the {vocabulary} logits")
    return found


def _tokens(metric: str, got: Outputs, answer: Any) -> list[int]:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return [answer]
    if not isinstance(answer, str):
        kind = type(answer).__name__
        raise InvalidInput(f"{metric}: an answer is text or a token's number, got {kind}")
    if got.tokenizer is None:
        raise InvalidInput(f"{metric}: answers as text need the model's tokenizer")
    return got.tokenizer.encode(answer, add_special_tokens=False)


def _describe(got: Outputs, answer: str, tokens: list[int]) -> str:
    spaced = f" {answer}"
    hint = ""
    if not answer.startswith(" "):
        single = len(got.tokenizer.encode(spaced, add_special_tokens=False)) == 1
        hint = f" ({spaced!r} is one)" if single else ""
    return f"{answer!r} is {len(tokens)}{hint}"
