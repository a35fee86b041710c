"""Edits of a language model during `generate` do what pushing those tokens by hand does."""

import pytest
import torch

from tests import tiny
from tests.oracle.decoding import ATTENTION, Push, decode

PROMPTS = ["a red cat and the dog", "the small house"]
COUNT = 5


@pytest.mark.parametrize("steps", [range(0, 1), range(2, 4)], ids=["prompt", "written"])
@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
def test_steering_some_decoding_steps(name: str, steps: range) -> None:
    import dreamreader as dr

    model, tokenizer = tiny.language_model(name)
    given = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    _, plain = decode(model, given.input_ids, given.attention_mask, COUNT)
    tokens, logits = decode(
        model, given.input_ids, given.attention_mask, COUNT, Push(ATTENTION[name], vector, steps)
    )
    assert (logits - plain).nan_to_num().abs().max() > 1e-2

    reader = dr.Reader(model, tokenizer)
    with reader.editing([dr.Steer(ATTENTION[name], vector, 1.0, steps=steps)]):
        ours = model.generate(
            **given,
            max_new_tokens=COUNT,
            min_new_tokens=COUNT,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(ours.sequences[:, -COUNT:], tokens)
    torch.testing.assert_close(torch.stack(ours.scores, 1), logits, rtol=1e-4, atol=1e-4)
