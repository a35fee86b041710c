"""Logit difference and probability on a real, tiny language model."""

from typing import Any

import pytest
import tiny
import torch

from dreamreader.errors import InvalidInput
from dreamreader.metrics import Outputs, build

PROMPTS = ["a red cat", "the house by the"]


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any, torch.Tensor]:
    network, tokenizer = tiny.language_model("llama")
    last = []
    with torch.no_grad():
        for prompt in PROMPTS:
            last.append(network(**tokenizer(prompt, return_tensors="pt")).logits[0, -1])
    return network, tokenizer, torch.stack(last)


def outputs(model: Any, answers: list[Any], wrong: list[Any] | None = None) -> Outputs:
    rows = [
        {"answer": a, "wrong_answer": w} for a, w in zip(answers, wrong or answers, strict=True)
    ]
    return Outputs(rows, logits=model[2], tokenizer=model[1])


def test_logit_difference_and_probability(model: Any) -> None:
    _, tokenizer, logits = model
    answers, wrong = [" cat", " tree"], [" dog", " house"]
    a, w = ([tokenizer.convert_tokens_to_ids("Ġ" + each.strip()) for each in words]
            for words in (answers, wrong))  # fmt: skip
    assert tokenizer.unk_token_id not in (*a, *w) and len({*a, *w}) == 4
    found = build("logit_difference").measure(outputs(model, answers, wrong), None)
    truth = [float(logits[row, a[row]].double() - logits[row, w[row]].double()) for row in range(2)]
    assert found == {"logit_difference": pytest.approx(truth, abs=1e-12)}
    odds = build("probability").measure(outputs(model, answers), None)["probability"]
    shares = logits.double().softmax(1)
    assert odds == pytest.approx([float(shares[row, a[row]]) for row in range(2)], rel=1e-9)


def test_a_number_is_a_token_and_columns_can_be_chosen(model: Any) -> None:
    got = Outputs([{"right": 7}, {"right": 8}], logits=model[2])
    found = build({"probability": {"answer": "right"}}).measure(got, None)["probability"]
    shares = model[2].double().softmax(1)
    assert found == pytest.approx([float(shares[0, 7]), float(shares[1, 8])])


@pytest.mark.parametrize(
    "answers, text",
    [
        ([" cat", " zebra"], "each answer must be one token; ' zebra' is 6$"),
        (["cat", " cat"], r"'cat' is 3 \(' cat' is one\)"),
        ([" cat", None], "row 1 has no 'answer'"),
        ([" cat", 1.5], "an answer is text or a token's number, got float"),
        ([" cat", 10**6], "token 1000000 is not among the"),
    ],
)
def test_answers_that_are_no_token_are_named(model: Any, answers: list[Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        build("probability").measure(outputs(model, answers), None)


def test_what_is_missing_is_said(model: Any) -> None:
    with pytest.raises(InvalidInput, match="need the model's tokenizer"):
        build("probability").measure(Outputs([{"answer": "a"}] * 2, logits=model[2]), None)
    with pytest.raises(InvalidInput, match="logit_difference needs logits; the outputs have text"):
        build("logit_difference").measure(Outputs([{"answer": "a"}], text=["b"]), None)
    got = Outputs([{"answer": 1}] * 2, logits=model[2])
    with pytest.raises(InvalidInput, match="row 0 has no 'wrong_answer'"):
        build("logit_difference").measure(got, None)
