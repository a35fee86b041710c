"""Language models: what a selection means where padding, time or the layout are easily missed."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from tiny import decoders
from torch import Tensor

import dreamreader as dr
from dreamreader.engine import Stream
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired

SHORT, LONG = "w5 w6 w7", "w9 w10 w11 w12 w13 w5 w6 w7"
SITE = "model.layers.0"
V = torch.randn(32, generator=torch.Generator().manual_seed(1))
GREEDY = {"do_sample": False}
BYTES = np.array([b"w5"])
# PEFT asks transformers by the names that were
OLD_NAMES = pytest.mark.filterwarnings("ignore:.*radient_checkpointing.*:FutureWarning")


def reader(name: str, **fields: Any) -> dr.Reader:
    return dr.Reader(decoders.build(name), decoders.tokenizer(**fields))


@pytest.fixture(scope="module")
def llama() -> dr.Reader:
    return reader("LlamaForCausalLM")


@pytest.fixture(scope="module")
def mamba() -> dr.Reader:
    return reader("MambaForCausalLM")


@pytest.fixture(scope="module")
def mixtral() -> dr.Reader:
    return reader("MixtralForCausalLM")


@pytest.fixture(scope="module")
def t5() -> dr.Reader:
    return reader("T5ForConditionalGeneration")


def touched(model: dr.Reader, prompts: Any, edit: Any, at: str = SITE) -> list[list[int]]:
    """Which tokens of every row an edit changes, padding included."""
    before = model.run(prompts, record=at).cache[at].tensor
    after = model.run(prompts, edits=edit, record=at).cache[at].tensor
    return ((before - after).flatten(3).abs().amax(-1) > 1e-6)[:, 0].int().tolist()


def padded(side: str) -> dict[str, Tensor]:
    """`SHORT` and `LONG` as a batch."""
    tokenizer = decoders.tokenizer()
    tokenizer.padding_side = side
    found = tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([False, False, True]),
        np.array([False, False, True]),
        [False, False, True],
        (False, False, True),
        torch.tensor([0.0, 0.0, 0.5]),
        np.array([0.0, 0.0, 0.5]),
        [0.0, 0.0, 0.5],
    ],
    ids=lambda mask: f"{type(mask).__name__} {np.asarray(mask).dtype}",
)
def test_a_mask_selects_the_same_in_every_form(llama: dr.Reader, mask: Any) -> None:
    assert touched(llama, SHORT, dr.Steer(SITE, V, 1.0, tokens=mask)) == [[0, 0, 1]]


@pytest.mark.parametrize(
    "chosen",
    [
        {"tokens": np.int64(1)},
        {"tokens": torch.tensor(1)},
        {"tokens": np.array([1])},
        {"tokens": [np.int32(1)]},
        {"tokens": {1}},
        {"tokens": range(1, 2)},
        {"tokens": 1, "steps": np.int64(0)},
        {"tokens": 1, "steps": torch.tensor([0])},
        {"tokens": 1, "rows": np.array([True])},
        {"tokens": 1, "rows": torch.tensor(0)},
        {"tokens": ["w6"]},
        {"tokens": np.array(["w6"])},
        {"tokens": np.array("w6")},
        {"tokens": np.array(1)},
        {"tokens": np.array([1], ">i4")},
    ],
    ids=repr,
)
def test_whole_numbers_of_every_kind_are_indices(llama: dr.Reader, chosen: Any) -> None:
    assert touched(llama, SHORT, dr.Steer(SITE, V, 1.0, **chosen)) == [[0, 1, 0]]


@pytest.mark.parametrize("mixed", [[0, True], [0.5, 1], ["w5", 1], [None], object(), 1.5, BYTES])
def test_what_is_neither_is_refused(llama: dr.Reader, mixed: Any) -> None:
    with pytest.raises(InvalidInput, match="tokens"):
        llama.run(SHORT, edits=dr.Steer(SITE, V, 1.0, tokens=mixed))


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_padding_is_seen_with_every_cache(name: str, settings: dict[str, Any]) -> None:
    model = reader(name)
    record = dr.Record("model.embed_tokens", tokens=0, steps=0)
    kw = {**GREEDY, **settings, **({"disable_compile": True} if settings else {})}
    found = model.run([SHORT, LONG], record=record, max_new_tokens=2, **kw)
    with torch.no_grad():
        first = model.subject.model.embed_tokens(torch.tensor([[5], [9]]))
    assert torch.equal(found.cache["model.embed_tokens"].tensor[:, 0], first)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_stream_gets_no_padding(llama: dr.Reader, settings: dict[str, Any]) -> None:
    found: list[Tensor] = []

    def keep(flowing: Any) -> None:
        found.append(flowing.tokens)

    kw = {**GREEDY, **settings, **({"disable_compile": True} if settings else {})}
    llama.run([SHORT, LONG], record=Stream(SITE, keep), max_new_tokens=2, **kw)
    assert sum(map(len, found)) == 3 + 8 + 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_the_rows_own(llama: dr.Reader, side: str) -> None:
    with llama.recording("model.embed_tokens", tokens=-1) as cache, torch.no_grad():
        llama.subject(**padded(side))
    weight = llama.subject.model.embed_tokens.weight
    for row in cache["model.embed_tokens"].tensor:
        assert torch.equal(row.flatten(), weight[7])  # both prompts end in w7


@pytest.mark.parametrize("side", ["left", "right"])
def test_edits_leave_padding_out_on_either_side(llama: dr.Reader, side: str) -> None:
    batch = padded(side)
    real = batch["attention_mask"].bool()
    cases = ((None, real), (-1, real & (real.cumsum(1) == real.sum(1, keepdim=True))))
    for tokens, wanted in cases:
        with torch.no_grad():
            with llama.recording(SITE) as before:
                llama.subject(**batch)
            with (
                llama.editing(dr.Steer(SITE, V, 1.0, tokens=tokens)),
                llama.recording(SITE) as after,
            ):
                llama.subject(**batch)
        change = (after[SITE].tensor - before[SITE].tensor)[:, 0].abs().amax(-1) > 0
        assert torch.equal(change, wanted)


@pytest.mark.parametrize("tokens", [None, -1])
def test_the_head_is_edited_at_the_tokens_that_it_gets(llama: dr.Reader, tokens: Any) -> None:
    push = torch.zeros(decoders.WORDS)
    push[10] = 1.0
    edit = dr.Steer("lm_head", push, 1e4, tokens=tokens)
    written = llama.run([SHORT, LONG], edits=edit, max_new_tokens=2, **GREEDY).output[:, -2:]
    assert written[:, 0].tolist() == [10, 10]
    assert (written[:, 1] == 10).all() == (tokens is None)
    logits = llama.run([SHORT, LONG], edits=edit, logits_to_keep=1).output.logits[:, -1]
    assert logits.argmax(-1).tolist() == [10, 10]


def test_the_head_does_not_get_the_first_token(llama: dr.Reader) -> None:
    push = torch.ones(decoders.WORDS)
    with pytest.raises(NeverFired, match="lm_head"):
        llama.run(LONG, edits=dr.Steer("lm_head", push, tokens=0), logits_to_keep=1)


@pytest.mark.parametrize("tokens", [0, 2, -1, [0, 1], slice(1, 3), None])
def test_experts_have_rows_and_tokens(mixtral: dr.Reader, tokens: Any) -> None:
    experts, mlp = f"{SITE}.mlp.experts", f"{SITE}.mlp"
    for prompts in (SHORT, [LONG, SHORT]):
        got = touched(mixtral, prompts, dr.Scale(experts, 0.0, tokens=tokens))
        assert got == touched(mixtral, prompts, dr.Scale(mlp, 0.0, tokens=tokens))
    seen = mixtral.run([LONG, SHORT], record=[experts, mlp]).cache
    assert torch.equal(seen[experts].tensor, seen[mlp].tensor)
    only = dr.Scale(experts, 0.0, rows=[1], tokens=tokens)
    assert not any(touched(mixtral, [LONG, SHORT], only)[0])


def test_a_word_is_found_in_experts(mixtral: dr.Reader) -> None:
    edit = dr.Scale(f"{SITE}.mlp.experts", 0.0, tokens="w6")
    assert touched(mixtral, SHORT, edit) == [[0, 1, 0]]


def test_recurrent_models_have_the_steps_of_other_decoders(mamba: dr.Reader) -> None:
    site = "backbone.layers.0"
    for steps in ([0], [2], [0, 3]):
        edit = dr.Steer(site, V, 1.0, steps=steps)
        line = mamba.run(SHORT, edits=edit, max_new_tokens=5, **GREEDY).firing[0]
        assert sorted(line.steps) == steps
    record = dr.Record(site, steps=slice(1, None))
    for prompt in ("w5", SHORT):
        found = mamba.run(prompt, record=record, max_new_tokens=4, **GREEDY).cache[site]
        assert [each.step for each in found.steps] == [1, 2, 3]
    whole = mamba.run("w5", record=site, max_new_tokens=4, **GREEDY).cache[site]
    assert whole.shape == (1, 4, 1, 32)
    with pytest.raises(InvalidInput, match="steps=0"):
        mamba.run(SHORT, record=site, max_new_tokens=4, **GREEDY)


def test_means_over_rows_of_unequal_length_leave_padding_out(llama: dr.Reader) -> None:
    from dreamreader.steering import LabelMeans

    together, apart = LabelMeans(), LabelMeans()
    together.add(llama.run([SHORT, LONG], record=SITE).cache, ["x", "y"])
    for prompt, label in ((SHORT, "x"), (LONG, "y")):
        apart.add(llama.run(prompt, record=SITE).cache, [label])
    got, wanted = (each.difference(SITE, "x", "y") for each in (together, apart))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_patch_takes_the_rows_own_token(llama: dr.Reader) -> None:
    cache = llama.run([SHORT, LONG], record=SITE).cache
    other = ["w5 w8 w7 w20", LONG]
    patch = dr.Patch(SITE, cache, rows=[0], tokens=[0])
    found = llama.run(other, edits=patch, record=dr.Record(SITE, tokens=0)).cache[SITE]
    clean = llama.run([SHORT, LONG], record=dr.Record(SITE, tokens=0)).cache[SITE]
    assert torch.equal(found.tensor[0], clean.tensor[0])


@pytest.mark.parametrize(
    "chosen", [{"tokens": [30]}, {"tokens": slice(-1, None), "steps": [1]}], ids=str
)
def test_what_matches_no_token_never_fired(llama: dr.Reader, chosen: dict[str, Any]) -> None:
    settings = {"max_new_tokens": 2, **GREEDY}
    for kw in (settings, {} if "steps" not in chosen else settings):
        with pytest.raises(NeverFired, match="matched no"):
            llama.run(SHORT, edits=dr.Steer(SITE, V, 1.0, **chosen), **kw)
        with pytest.raises(NeverFired):
            llama.run(SHORT, record=dr.Record(SITE, **chosen), **kw)


def test_a_selection_that_matches_in_one_row_fires(llama: dr.Reader) -> None:
    edit = dr.Steer(SITE, V, 1.0, tokens=[5])
    assert touched(llama, [SHORT, LONG], edit) == [[0] * 8, [0, 0, 0, 0, 0, 1, 0, 0]]


@OLD_NAMES
@pytest.mark.parametrize("tokens", [-1, 0, slice(1, 3), None])
def test_adapters_do_not_move_tokens(llama: dr.Reader, tokens: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = decoders.build("LlamaForCausalLM")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    adapted = dr.Reader(lora, decoders.tokenizer())
    settings = {"max_new_tokens": 4, **GREEDY}
    got, wanted = (
        each.run([SHORT, LONG], edits=dr.Steer(site, V, 5.0, tokens=tokens), **settings)
        for each, site in ((adapted, "base_model.model." + SITE), (llama, SITE))
    )
    assert torch.equal(got.output, wanted.output)
    assert dict(got.firing[0].steps) == dict(wanted.firing[0].steps)


@OLD_NAMES
def test_gradient_checkpointing_is_right_inside_and_refused_after() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model = decoders.build("LlamaForCausalLM").train().requires_grad_()
    tracked = dr.Reader(model)

    def gradients(reentrant: bool | None, inside: bool) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        model.gradient_checkpointing_disable()
        learned = V.clone().requires_grad_()
        if reentrant is not None:
            settings = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            model.enable_input_require_grads()
        with tracked.editing(dr.Steer(f"{SITE}.self_attn", learned, 2.0)):
            loss = model(ids, labels=ids, use_cache=False).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        weight = model.model.layers[0].mlp.up_proj.weight
        assert learned.grad is not None and weight.grad is not None
        return learned.grad, weight.grad.clone()

    wanted = gradients(None, inside=False)
    for reentrant in (True, False):
        for got, right in zip(gradients(reentrant, inside=True), wanted, strict=True):
            torch.testing.assert_close(got, right)
        with pytest.raises(InvalidInput, match="backward inside"):
            gradients(reentrant, inside=False)


@OLD_NAMES
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "edit",
    [
        dr.Ablate(f"{SITE}.self_attn", "noise"),
        dr.Steer(f"{SITE}.self_attn", V, 2.0),
        dr.Steer(f"{SITE}.self_attn", V, 2.0, tokens=[0], steps=[0]),
    ],
    ids=["noise", "all", "chosen"],
)
def test_what_is_computed_again_knows_its_tokens_and_step(edit: Any, reentrant: bool) -> None:
    batch = padded("left")
    model = decoders.build("LlamaForCausalLM").train().requires_grad_()
    model.enable_input_require_grads()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            settings = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        with dr.Reader(model).editing(edit):
            for _ in range(2):
                model.zero_grad()
                model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        grad = model.model.layers[0].mlp.up_proj.weight.grad
        assert grad is not None
        found.append(grad.clone())
    torch.testing.assert_close(*found)


def test_calls_of_another_thread_are_left_alone(llama: dr.Reader) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = llama.subject(ids).logits
    found: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.append(llama.subject(ids).logits)

    with llama.editing(dr.Steer(SITE, V, 50.0)), llama.recording(SITE) as cache, torch.no_grad():
        other = threading.Thread(target=call)
        other.start()
        other.join()
        edited = llama.subject(ids).logits
    assert torch.equal(found[0], plain)
    assert (edited - plain).abs().max() > 1e-2
    assert cache[SITE].shape[0] == 1


@pytest.mark.parametrize(
    "settings",
    [{"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": True}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("tokens", [-1, 0, slice(3, 12), None])
def test_the_prompts_end_is_that_of_generate(
    llama: dr.Reader, settings: dict[str, Any], tokens: Any
) -> None:
    """However generate cuts its calls, the same tokens are edited, so the text is the same."""
    if "assistant_model" in settings:
        settings = {"assistant_model": decoders.build("LlamaForCausalLM")}
    model = llama.subject
    batch = decoders.tokenizer()(LONG, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    edit = dr.Steer(SITE, V, 9.0, tokens=tokens)
    written = []
    for extra in ({}, settings):
        with llama.editing(edit), torch.no_grad():
            written.append(model.generate(**batch, max_new_tokens=6, **GREEDY, **extra))
    assert torch.equal(*written)


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_norms_of_queries_and_keys_are_addressed_by_token(name: str, norm: str) -> None:
    model, site = reader(name), f"model.layers.1.self_attn.{norm}"
    module = model.subject.get_submodule(site)
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    try:
        with torch.no_grad(), model.recording(site) as cache:
            model.subject(ids)
    finally:
        handle.remove()
    heads = 4 if norm == "q_norm" else 2
    raw = found[0] if found[0].shape[1] == 6 else found[0].transpose(1, 2)
    assert raw.shape == (1, 6, heads, 8)
    assert torch.equal(cache[site].tensor[:, 0].reshape(raw.shape), raw)
    for tokens, wanted in ((0, [0]), (-1, [5]), ([1, 3], [1, 3])):
        with (
            torch.no_grad(),
            model.editing(dr.Steer(site, torch.ones(8), 10.0, tokens=tokens)),
            model.recording(site) as after,
        ):
            model.subject(ids)
        change = (after[site].tensor[:, 0].reshape(raw.shape) - raw).abs()
        assert change.amin((0, 2, 3)).nonzero().flatten().tolist() == wanted
        assert change.amax((0, 2, 3)).nonzero().flatten().tolist() == wanted


def test_the_text_of_an_encoder_decoder_is_whole(t5: dr.Reader) -> None:
    result = t5.run(SHORT, max_new_tokens=4, **GREEDY)
    wanted = [f"w{token}" for token in result.output[0, 1:].tolist() if token > 2]
    assert result.text is not None and wanted
    assert result.text[0].split() == wanted


def test_an_encoder_decoder_runs_forward_from_its_start_token(t5: dr.Reader) -> None:
    ids = decoders.tokenizer()(SHORT, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = t5.subject(ids, decoder_input_ids=torch.tensor([[2]])).logits
    torch.testing.assert_close(t5.run(SHORT).output.logits, wanted)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_beams_belong_to_their_row(llama: dr.Reader, settings: dict[str, Any]) -> None:
    beams = settings["num_beams"]
    record = dr.Record(SITE, steps=0, tokens=-1)
    found = llama.run([SHORT, LONG], record=record, max_new_tokens=3, **GREEDY, **settings)
    activation = found.cache[SITE]
    assert [row.index for row in activation.rows] == [0] * beams + [1] * beams
    alone = llama.run([SHORT, LONG], record=dr.Record(SITE, tokens=-1)).cache[SITE].tensor
    for entry, values in enumerate(activation.tensor):
        torch.testing.assert_close(values, alone[entry // beams], rtol=1e-4, atol=1e-5)
    edit = dr.Steer(SITE, V, [0.0, 9.0])
    both = llama.run([SHORT, LONG], edits=edit, max_new_tokens=3, **GREEDY, **settings)
    plain = llama.run([SHORT, LONG], max_new_tokens=3, **GREEDY, **settings)
    each = len(plain.output) // 2
    assert torch.equal(both.output[:each], plain.output[:each])
    assert not torch.equal(both.output[each:], plain.output[each:])


def test_a_prefix_cache_says_that_the_prompts_length_is_unknown(llama: dr.Reader) -> None:
    model = llama.subject
    with torch.no_grad():
        held = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        with pytest.raises(ClockUnknown, match="prompt"):
            with llama.recording(SITE, tokens=-1):
                model(torch.tensor([[8, 9]]), past_key_values=held)


def test_a_factor_that_requires_grad_is_named_as_the_user_knows_it() -> None:
    with pytest.raises(InvalidInput, match="Scale: factor requires grad and gets no gradient"):
        dr.Scale(SITE, torch.tensor(0.5, requires_grad=True))


def test_flattened_values_have_rows_and_tokens() -> None:
    model = reader("OPTForCausalLM")
    for name in ("fc1", "fc2"):
        site = f"model.decoder.layers.1.{name}"
        found = model.run([SHORT, LONG], record=[site]).cache[site]
        assert found.shape[:3] == (2, 1, 8)
        alone = model.run(SHORT, record=site).cache[site].tensor
        torch.testing.assert_close(found.tensor[0, :, -3:], alone[0], rtol=1e-4, atol=1e-5)


def test_what_all_rows_share_is_edited_by_token_and_not_by_row() -> None:
    model = reader("GPT2LMHeadModel")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    site = "transformer.wpe"

    def by_hand(module: Any, args: Any, output: Tensor) -> Tensor:
        assert output.shape == (1, 3, 32)
        return output + V * torch.tensor([0.0, 1.0, 0.0])[:, None]

    handle = model.subject.get_submodule(site).register_forward_hook(by_hand)
    with torch.no_grad():
        wanted = model.subject(ids).logits
        handle.remove()
        with model.editing(dr.Steer(site, V, 1.0, tokens=1)):
            got = model.subject(ids).logits
        torch.testing.assert_close(got, wanted)
        for edit in (dr.Steer(site, V, 1.0, rows=[1]), dr.Steer(site, V, [0.0, 1.0])):
            with pytest.raises(InvalidInput, match="1 entries where 2 are expected"):
                with model.editing(edit):
                    model.subject(ids)


@pytest.mark.parametrize(
    "chosen", [[0, 0, 1], (1, 0, 1), np.array([0, 1, 1]), torch.tensor([0, 1], dtype=torch.uint8)]
)
def test_zeros_and_ones_that_could_be_a_mask_are_refused(chosen: Any) -> None:
    for name in ("tokens", "rows"):
        with pytest.raises(InvalidInput, match=f"{name}: .*could be indices or a mask"):
            dr.Record("model.layers.0", **{name: chosen})
