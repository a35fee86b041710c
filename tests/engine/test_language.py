"""Language models: decoding position as step, left padding, forward and generate."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.edits import Ablate, Steer
from dreamreader.engine import Reader, Record
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired

PROMPTS = ["a cat", "a red dog on a tree"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}


def site_of(name: str, layer: int = 1) -> str:
    stem = {"gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}.get(name, "model.layers")
    return f"{stem}.{layer}"


@pytest.fixture(scope="module", params=tiny.LANGUAGE_MODELS)
def reader(request: pytest.FixtureRequest) -> Reader:
    reader = Reader(*tiny.language_model(request.param))
    reader.site = site_of(request.param)
    return reader


@pytest.fixture(scope="module")
def gpt2() -> Reader:
    return Reader(*tiny.language_model("gpt2"))


V = torch.ones(32)


def test_steps_are_decoding_positions(reader: Reader) -> None:
    result = reader.run(PROMPTS, edits=Steer(reader.site, V, 0.1, steps=slice(1, 3)), **GREEDY)
    assert sorted(result.firing[0].steps) == [1, 2]
    later = reader.run(PROMPTS, record=Record(reader.site, steps=slice(1, None)), **GREEDY).cache
    assert [each.step for each in later[reader.site].steps] == [1, 2, 3, 4]
    assert later[reader.site].shape == (2, 4, 1, 32)


def test_generation_without_a_cache_has_the_same_steps(reader: Reader) -> None:
    kw = {**GREEDY, "use_cache": False}
    edit = Steer(reader.site, V, 0.1, steps=2)
    assert dict(reader.run(PROMPTS, edits=edit, **kw).firing[0].steps) == {2: 1}


def test_a_row_is_the_same_alone_and_padded(reader: Reader) -> None:
    edit = Steer(reader.site, 5 * V, tokens=[0, -1])
    both = reader.run(PROMPTS, edits=edit).output.logits
    for row, prompt in enumerate(PROMPTS):
        alone = reader.run(prompt, edits=edit).output.logits
        torch.testing.assert_close(both[row, -alone.shape[1] :], alone[0], rtol=1e-4, atol=1e-4)


def test_generated_text_of_a_row_does_not_depend_on_its_batch(gpt2: Reader) -> None:
    edit = Steer("transformer.h.1", V, [0.0, 3.0])
    whole = gpt2.run(PROMPTS, edits=edit, **GREEDY)
    split = gpt2.run(PROMPTS, edits=edit, batch_size=1, **GREEDY)
    assert whole.text == split.text
    assert whole.text[0] == gpt2.run(PROMPTS, **GREEDY).text[0]


def test_an_edit_equals_a_plain_hook(reader: Reader) -> None:
    module = reader.subject.get_submodule(reader.site)

    def hook(_: Any, __: Any, out: Any) -> Any:
        new = (out[0] if isinstance(out, tuple) else out) + 2 * V
        return (new, *out[1:]) if isinstance(out, tuple) else new

    ids = reader.tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    handle = module.register_forward_hook(hook)
    expected = reader.subject(ids).logits
    handle.remove()
    with reader.editing(Steer(reader.site, V, 2.0)) as report:
        got = reader.subject(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert dict(report[0].steps) == {0: 1}
    assert torch.equal(reader.subject(ids).logits, reader.subject(ids).logits)
    assert not module._forward_hooks


def test_tokens_count_from_the_first_real_token(gpt2: Reader) -> None:
    record = Record("transformer.h.1", tokens=0)
    found = gpt2.run(PROMPTS, record=record).cache["transformer.h.1"].tensor[:, 0, 0]
    for row, prompt in enumerate(PROMPTS):
        alone = gpt2.run(prompt, record="transformer.h.1").cache["transformer.h.1"].tensor
        torch.testing.assert_close(found[row], alone[0, 0, 0], rtol=1e-4, atol=1e-5)


def test_padding_is_not_edited(gpt2: Reader) -> None:
    seen = gpt2.run(PROMPTS, record="transformer.h.1").cache["transformer.h.1"].tensor
    after = gpt2.run(PROMPTS, edits=Steer("transformer.h.1", V), record="transformer.h.1")
    change = (after.cache["transformer.h.1"].tensor - seen)[:, 0]
    lengths = [len(gpt2.tokenizer(prompt).input_ids) for prompt in PROMPTS]
    pad = max(lengths) - lengths[0]
    assert pad > 0
    assert not change[0, :pad].any()
    torch.testing.assert_close(change[0, pad:], torch.ones_like(change[0, pad:]))


def test_a_word_of_the_prompt(gpt2: Reader) -> None:
    record = Record("transformer.h.0", tokens="dog")
    found = gpt2.run("a red dog", record=record).cache["transformer.h.0"]
    ids = gpt2.tokenizer("a red dog").input_ids
    kept = "".join(gpt2.tokenizer.decode([ids[at]]) for at in found.tokens or ())
    assert kept.strip() == "dog"


@pytest.mark.parametrize("prompts", ["a red dog", ["a red dog", "a dog"]])
def test_a_mask_of_a_text_has_one_dimension(gpt2: Reader, prompts: Any) -> None:
    count = len(gpt2.tokenizer("a red dog").input_ids)
    edit = Steer("transformer.h.0", V, tokens=torch.ones(1, count))
    text = rf"tokens is a mask of \[1, {count}\], that of a text is \[{count}\], its tokens"
    with pytest.raises(InvalidInput, match=text):
        gpt2.run(prompts, edits=edit)


def test_patching_heads_between_prompts(gpt2: Reader) -> None:
    from dreamreader.edits import Patch

    site = "transformer.h.1.attn:heads"
    clean = gpt2.run("a red dog", record=site)
    same = gpt2.run("a red dog", edits=Patch(site, clean.cache)).output.logits
    assert torch.equal(same, clean.output.logits)
    other = gpt2.run("a red cat", edits=Patch(site, clean.cache, heads=[2])).output.logits
    assert not torch.equal(other, gpt2.run("a red cat").output.logits)


def test_gradients_reach_a_direction(gpt2: Reader) -> None:
    v = torch.zeros(32, requires_grad=True)
    ids = gpt2.tokenizer("a red dog", return_tensors="pt").input_ids
    with gpt2.editing(Steer("transformer.h.1", v, 1.0)):
        gpt2.subject(ids).logits[0, -1, 5].backward()
    assert v.grad is not None and v.grad.abs().sum() > 0
    step = 1e-2 * v.grad / v.grad.norm()
    with gpt2.editing(Steer("transformer.h.1", step)):
        after = gpt2.subject(ids).logits[0, -1, 5]
    gain = (after - gpt2.subject(ids).logits[0, -1, 5]).item()
    assert gain == pytest.approx(float(step @ v.grad), rel=0.1)


def test_sampling_draws_from_the_seed_of_the_row(gpt2: Reader) -> None:
    kw = {"max_new_tokens": 6, "do_sample": True, "min_new_tokens": 6}
    both = gpt2.run("a red", seeds=[1, 2], **kw)
    assert both.text[1] == gpt2.run("a red", seeds=2, **kw).text[0]
    assert both.text[0] != both.text[1]


def test_steps_of_different_length_do_not_make_one_tensor(gpt2: Reader) -> None:
    with pytest.raises(InvalidInput, match="steps=0 and what it generates with steps=slice"):
        gpt2.run(PROMPTS, record="transformer.h.1", **GREEDY)


def test_language_models_have_no_timesteps(gpt2: Reader) -> None:
    with pytest.raises(ClockUnknown, match="decoding steps, no timesteps or noise"):
        gpt2.run(PROMPTS, edits=Steer("transformer.h.1", V, sigmas=(0.1, 0.2)))


def test_positions_that_never_come_are_an_error(gpt2: Reader) -> None:
    with pytest.raises(
        NeverFired, match=r"never fired at transformer.h.1: .*steps that ran: 0, 1, 2"
    ):
        gpt2.run(PROMPTS, edits=Steer("transformer.h.1", V, steps=50), **GREEDY)


def test_prompts_need_a_tokenizer(gpt2: Reader) -> None:
    with pytest.raises(InvalidInput, match=r"need a tokenizer: Reader\(model, tokenizer\)"):
        Reader(gpt2.subject).run("a cat")


def test_several_runs_in_one_block_are_rows(gpt2: Reader) -> None:
    ids = gpt2.tokenizer("a red dog", return_tensors="pt").input_ids
    with gpt2.recording("transformer.h.1") as cache:
        first: Tensor = gpt2.subject(ids).logits
        gpt2.subject(ids)
    assert cache["transformer.h.1"].shape[:3] == (2, 1, ids.shape[1])
    assert torch.equal(*cache["transformer.h.1"].tensor.unbind())
    assert torch.equal(first, gpt2.subject(ids).logits)


def test_ablating_a_head_equals_zeroing_its_columns(gpt2: Reader) -> None:
    model = gpt2.subject
    ids = gpt2.tokenizer("a red dog", return_tensors="pt").input_ids
    with gpt2.editing(Ablate("transformer.h.2.attn:heads", heads=[1])):
        got = model(ids).logits
    weight = model.transformer.h[2].attn.c_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[8:16] = 0
        expected = model(ids).logits
        weight.copy_(kept)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("asked", [{}, {"max_new_tokens": 4}])
def test_more_tokens_than_a_table_of_positions_has(asked: dict[str, int]):
    reader = Reader(*tiny.language_model("gpt2"))
    limit = reader.subject.config.max_position_embeddings
    reader.run("a " * (limit // 4), **asked)
    prompt, count = "a", 1
    while count <= limit:
        prompt += " a"
        count = len(reader.tokenizer(prompt).input_ids)
    text = rf"GPT2LMHeadModel has positions for {limit} tokens; the longest prompt has {count}\."
    with pytest.raises(InvalidInput, match=text):
        reader.run([prompt, "a cat"], **asked)


def test_more_new_tokens_than_a_table_of_positions_has():
    reader = Reader(*tiny.language_model("gpt2"))
    limit = reader.subject.config.max_position_embeddings
    tokens = len(reader.tokenizer("a cat").input_ids)
    asked: Any = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    reader.run("a cat", max_new_tokens=limit - tokens + 1, **asked)
    text = f"the longest prompt has {tokens}, and max_new_tokens={limit} more are asked for"
    with pytest.raises(InvalidInput, match=text):
        reader.run("a cat", max_new_tokens=limit, **asked)
