"""Decoding by hand writes what `generate` writes."""

import pytest
import torch

from tests import tiny

from .decoding import ATTENTION, Push, decode

PROMPTS = ["a red cat and the dog", "the small house"]


@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
def test_decoding_writes_what_generate_writes(name: str) -> None:
    model, tokenizer = tiny.language_model(name)
    given = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    theirs = model.generate(
        **given,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens, logits = decode(model, given.input_ids, given.attention_mask, 5)
    assert torch.equal(theirs.sequences[:, -5:], tokens)
    torch.testing.assert_close(torch.stack(theirs.scores, 1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
def test_push_changes_its_steps_and_later_ones_only(name: str) -> None:
    model, tokenizer = tiny.language_model(name)
    given = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    _, plain = decode(model, given.input_ids, given.attention_mask, 5)
    push = Push(ATTENTION[name], torch.full((32,), 2.0).cumsum(0).sin() * 3, range(2, 4), rows=[1])
    _, pushed = decode(model, given.input_ids, given.attention_mask, 5, push)
    moved = (pushed - plain).nan_to_num().abs().amax(-1)
    assert (moved[0] == 0).all()
    assert (moved[1, :2] == 0).all() and (moved[1, 2:] > 1e-2).all()
