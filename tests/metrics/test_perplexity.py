"""Perplexity of given texts, beside the loss that transformers computes."""

import math
from typing import Any

import pytest
import tiny
import torch

from dreamreader.edits import Steer
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment
from dreamreader.metrics import Outputs, build

TEXTS = ["a red cat on the tree", "the house", "a blue dog by the red house on a tree"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def reader(request: pytest.FixtureRequest) -> Reader:
    return Reader(*tiny.language_model(request.param))


def experiment(reader: Reader, texts: list[Any], **changes: Any) -> Experiment:
    layer = reader.sites("**.1").names[0]
    steer = {"kind": "steer", "site": layer, "direction": {"random": 3}, "alpha": "$alpha"}
    fields: dict[str, Any] = {
        "name": "texts",
        "data": {"prompts": [{"prompt": "a cat", "plain_text": text} for text in texts]},
        "method": {"kind": "edit", "edits": [steer], "sweep": {"alpha": [0.0, 8.0]}},
        "metrics": ["perplexity"],
        "batch": {"rows": 16},
    }
    return Experiment(reader=reader, **fields | changes)


def loss_of(reader: Reader, text: str) -> float:
    """The model's own loss of a text alone, without padding."""
    ids = reader.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(reader.subject(ids, labels=ids).loss)


def test_it_is_exp_of_the_loss_that_transformers_computes(reader, tmp_path) -> None:
    """Texts of different lengths in one batch, padded; unedited and edited rows side by side."""
    made = experiment(reader, TEXTS)
    results = made.run(tmp_path / "run")
    assert len(made.job.units) == 1
    plain = [math.exp(loss_of(reader, text)) for text in TEXTS]
    for where in ({"condition": "unedited"}, {"condition": "edited", "alpha": 0.0}):
        found = [row["perplexity"] for row in results.of(**where)]
        assert found == pytest.approx(plain, rel=1e-4)
    steered: Any = made.spec.method.edits_of(made.job, made.job.rows)[-1]
    edit = Steer(steered.site, steered.direction, 8.0)
    for row in results.of("edited", alpha=8.0):
        text = row["plain_text"]
        ids = reader.tokenizer(text, return_tensors="pt").input_ids
        logits = reader.run(text, edits=edit).output.logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp()
        assert row["perplexity"] == pytest.approx(float(expected), rel=1e-3)
        assert abs(row["perplexity"] / plain[TEXTS.index(text)] - 1) > 0.01


def test_generating_rows_are_measured_on_their_texts_too(reader, tmp_path) -> None:
    pipeline = {"max_new_tokens": 3, "do_sample": False}
    metrics = ["perplexity", {"matches": {"pattern": "[a-z]"}}]
    results = experiment(reader, TEXTS[:1], pipeline=pipeline, metrics=metrics).run(
        tmp_path / "run"
    )
    base = results.of("unedited")[0]
    assert base["perplexity"] == pytest.approx(math.exp(loss_of(reader, TEXTS[0])), rel=1e-4)
    assert all(row["matches"] == any(map(str.islower, row["text"])) for row in results.rows)


def test_the_column_of_the_text_can_be_chosen(reader, tmp_path) -> None:
    data = {"prompts": [{"prompt": "a cat", "plain_text": TEXTS[1], "other": TEXTS[0]}]}
    metrics = [{"perplexity": {"text": "other"}}]
    results = experiment(reader, [], data=data, metrics=metrics).run(tmp_path / "run")
    expected = math.exp(loss_of(reader, TEXTS[0]))
    assert results.of("unedited")[0]["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("text", [None, 3], ids=["none", "number"])
def test_a_row_without_a_text(reader, tmp_path, text) -> None:
    told = "needs a language model, and a text in the column 'plain_text' of entry '0'"
    with pytest.raises(InvalidInput, match=told):
        experiment(reader, [text]).run(tmp_path / "run")


def test_one_token_has_no_perplexity(tmp_path) -> None:
    """What is predicted is the tokens behind the first; a llama puts one before every text."""
    reader = Reader(*tiny.language_model("gpt2"))
    with pytest.raises(InvalidInput, match="perplexity: a text must have two tokens or more"):
        experiment(reader, [TEXTS[0], "a"]).run(tmp_path / "run")


def test_it_is_exp_of_the_surprisal_of_the_outputs() -> None:
    metric = build("perplexity")
    with pytest.raises(InvalidInput, match="perplexity needs surprisal; the outputs have logits"):
        metric.measure(Outputs([{}], logits=torch.zeros(1, 4)), None)
    found = metric.measure(Outputs([{}, {}], surprisal=torch.tensor([0.0, math.log(7)])), None)
    assert found == {"perplexity": pytest.approx([1.0, 7.0])} and not metric.compares


@pytest.mark.parametrize(
    "pattern, found",
    [("!", [True, False, False]), ("^I ", [False, True, False]), ("(?i)what", [True, False, True])],
    ids=["mark", "start", "case"],
)
def test_a_pattern_is_found_anywhere_in_a_text(pattern, found) -> None:
    texts = ["What a day!", "I came home.", "so what"]
    got = Outputs([{}] * 3, text=texts)
    assert build({"matches": {"pattern": pattern}}).measure(got, None) == {"matches": found}


def test_each_row_has_a_text_of_its_own() -> None:
    rows = [{"answer": "Oslo."}, {"answer": "Rome"}, {"answer": None}, {"answer": "Oslo."}]
    got = Outputs(rows, text=[" Oslo.", " Oslo.", " Rome", " Oslos"])
    found = build({"matches": {"column": "answer"}}).measure(got, None)
    assert found == {"matches": [True, False, None, False]}
    none = Outputs(rows[2:3], text=[" Rome"])  # a batch may have no such row
    assert build({"matches": {"column": "answer"}}).measure(none, None) == {"matches": [None]}
    loose = build({"matches": {"column": "answer", "ignore_case": True}})
    got = Outputs(rows[:3], text=["so OSLO.", "rom", ""])
    assert loose.measure(got, None) == {"matches": [True, False, None]}
    loose = build({"matches": {"pattern": "^A", "ignore_case": True}})
    assert loose.measure(got, None) == {"matches": [False] * 3}
    assert loose.measure(Outputs([{}], text=["ah"]), None) == {"matches": [True]}
    for options in ({}, {"pattern": "a", "column": "answer"}):
        with pytest.raises(InvalidInput, match="matches: give one of pattern"):
            build({"matches": options})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"column": 3}, "matches: column is a name, such as answer, got 3"),
        ({"column": ""}, "matches: column is a name, such as answer, got ''"),
        ({"pattern": "a", "ignore_case": "no"}, "matches: ignore_case is true or false, got 'no'"),
    ],
)
def test_options_of_another_kind(options, said) -> None:
    with pytest.raises(InvalidInput, match=said):
        build({"matches": options})


def test_patterns_and_outputs_that_cannot_be_matched() -> None:
    with pytest.raises(InvalidInput, match=r"matches: pattern '\(' is no regular expression: miss"):
        build({"matches": {"pattern": "("}})
    with pytest.raises(InvalidInput, match="matches: pattern 3 is no regular expression"):
        build({"matches": {"pattern": 3}})
    with pytest.raises(InvalidInput, match="matches needs text; the outputs have logits"):
        build({"matches": {"pattern": "a"}}).measure(Outputs([{}], logits=torch.zeros(1, 4)), None)
