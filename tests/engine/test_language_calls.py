"""Calls of a language model that are not one of its steps, and models that do not write."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import decoders
from torch import Tensor, nn

import dreamreader as dr
from dreamreader.engine import Record
from dreamreader.engine._session import Session
from dreamreader.errors import ClockUnknown

SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
BLOCK = "model.layers.0"


@pytest.fixture(scope="module")
def llama() -> dr.Reader:
    return dr.Reader(decoders.build("LlamaForCausalLM"), decoders.tokenizer())


def marks(reader: dr.Reader, site: str, call: Callable[[], Any], **selection: Any) -> list[Any]:
    """For each call of a module which of its entries an edit changed: [rows, tokens] of 0 and 1."""
    found: list[Any] = []
    module = reader._subject.modules()[site]

    def tensor(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple | list) else output

    plain: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: plain.append(tensor(output)))
    with torch.no_grad(), reader.editing(dr.Edit(site, lambda x: x + 1e4, **selection)):
        after = module.register_forward_hook(lambda _, __, output: found.append(tensor(output)))
        try:
            call()
        finally:
            handle.remove()
            after.remove()
    return [(each.abs().amax(-1) > 5e3).int().tolist() for each in found]


@pytest.mark.parametrize(
    ("build", "site"),
    [
        (lambda: decoders.build("LlamaForCausalLM").model, "layers.0"),
        (lambda: decoders.build("GPT2LMHeadModel").transformer, "h.0"),
        (
            lambda: nn.ModuleDict({"inner": decoders.build("LlamaForCausalLM")}).inner.model,
            "layers.0",
        ),
    ],
)
def test_models_that_do_not_write_have_rows_with_tokens_of_their_own(build: Any, site: str) -> None:
    model = build()
    ids = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = marks(dr.Reader(model), site, lambda: model(ids, attention_mask=mask), tokens=-1)
    assert found == [[[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]]


class Wrapped(nn.Module):
    """A module of a user's own around a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = decoders.build("LlamaForCausalLM")
        self.head = nn.Linear(48, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.inner(tokens, attention_mask=mask).logits[:, -1])


def test_a_language_model_inside_a_module_has_tokens_too() -> None:
    model = Wrapped()
    ids = torch.tensor([[0, 0, 3, 4], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    site = "inner.model.layers.0"
    assert marks(dr.Reader(model), site, lambda: model(ids, mask), tokens=0) == [
        [[0, 0, 1, 0], [1, 0, 0, 0]]
    ]


def test_a_second_pass_inside_generate_is_none_of_its_steps(llama: dr.Reader) -> None:
    settings = {**SETTINGS, "guidance_scale": 1.5, "attention_mask": torch.ones_like(IDS)}
    every = marks(llama, BLOCK, lambda: llama.subject.generate(IDS, **settings))
    assert len(every) == 6 and all(bool(torch.tensor(each).all()) for each in every)
    with pytest.raises(ClockUnknown, match="called inside generate, but not for one of its steps"):
        marks(llama, BLOCK, lambda: llama.subject.generate(IDS, **settings), steps=[0])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_virtual_tokens_of_an_adapter_are_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(decoders.build("LlamaForCausalLM"), config).eval()
    reader = dr.Reader(model, decoders.tokenizer())
    site = next(name for name in reader._subject.modules() if name.endswith("layers.0"))
    with pytest.raises(ClockUnknown, match="PEFT puts virtual tokens before"):
        reader.run("w5 w6 w7", record=dr.Record(site, tokens=-1))


@pytest.mark.parametrize(
    ("given", "mask", "tokens", "expected"),
    [
        (
            [[2, 20, 21, 22], [1, 1, 2, 23]],
            [[1, 1, 1, 1], [0, 0, 1, 1]],
            0,
            [[1, 0, 0, 0], [0, 0, 1, 0]],
        ),
        ([[20, 21]], None, -1, [[0, 0, 1]]),  # generate puts the start token before
    ],
)
def test_the_decoders_prompt_is_what_generate_prepares(
    given: Any, mask: Any, tokens: int, expected: Any
) -> None:
    model = decoders.build("T5ForConditionalGeneration")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])[: len(given)]
    more = {} if mask is None else {"decoder_attention_mask": torch.tensor(mask)}

    def call() -> None:
        model.generate(ids, decoder_input_ids=torch.tensor(given), **more, **SETTINGS)

    assert marks(dr.Reader(model), "decoder.block.0", call, tokens=tokens)[0] == expected


def test_tokens_in_the_order_of_experts_are_no_rows() -> None:
    model = decoders.build("MixtralForCausalLM")
    for each in model.modules():
        for name in ("top_k", "num_experts_per_tok"):
            if hasattr(each, name):
                setattr(each, name, 1)
    reader, experts = dr.Reader(model), f"{BLOCK}.mlp.experts"
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    with pytest.raises(ClockUnknown, match="experts.act_fn"):
        with torch.no_grad(), reader.editing(dr.Scale(f"{experts}.act_fn", 0.0, tokens=0)):
            model(ids)
    found = marks(reader, experts, lambda: model(ids), tokens=0)
    assert found == [[1, 0, 0, 0, 1, 0, 0, 0]]


def test_a_call_goes_on_where_its_own_cache_ended(llama: dr.Reader) -> None:
    model = llama.subject

    def interleaved() -> None:
        one, two = (transformers.DynamicCache(config=model.config) for _ in range(2))
        model(IDS, past_key_values=one)
        model(IDS[:, :3], past_key_values=two)
        for _ in range(3):
            model(IDS[:, :1], past_key_values=two)
        model(IDS[:, :1], past_key_values=one)

    found = marks(llama, BLOCK, interleaved, steps=[1])
    assert [sum(each[0]) for each in found] == [0, 0, 1, 0, 0, 1]


def test_the_head_gets_the_tokens_in_the_order_asked_for(llama: dr.Reader) -> None:
    kept = torch.tensor([5, 4, 3, 2, 1, 0])
    with torch.no_grad(), llama.recording("lm_head") as cache:
        llama.subject(IDS, logits_to_keep=kept)
    assert cache["lm_head"].positions is None  # the layers before it have as many, in order
    with pytest.raises(ClockUnknown, match="those that logits_to_keep leaves, in another order"):
        with torch.no_grad(), llama.recording(dr.Record("lm_head", tokens=[0])):
            llama.subject(IDS, logits_to_keep=kept)


def test_a_thread_whose_target_is_the_model_is_another_thread() -> None:
    net, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    plain, found = net(x).detach(), []
    net.register_forward_hook(lambda _, __, output: found.append(torch.equal(output, plain)))
    with torch.no_grad(), dr.Reader(net).editing(dr.Scale("0", 3.0)):
        net(x)
        for target in (net, net.forward, net.__call__):
            thread = threading.Thread(target=target, args=(x,))
            thread.start()
            thread.join()
    assert found == [False, True, True]


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_computed_again_know_their_tokens_and_step(reentrant: bool) -> None:
    model = decoders.build("LlamaForCausalLM").train()
    reader, grads = dr.Reader(model), []
    for checkpointed in (False, True):
        if checkpointed:
            settings = {"use_reentrant": reentrant}
            model._set_gradient_checkpointing(gradient_checkpointing_func=_checkpoint(**settings))
            model.enable_input_require_grads()
        push = torch.ones(model.config.hidden_size, requires_grad=True)
        with reader.editing(dr.Steer(f"{BLOCK}.mlp", push, alpha=2.0, tokens=0, steps=0)):
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append(push.grad)
    assert bool(grads[0].any()) and torch.allclose(*grads)


def _checkpoint(use_reentrant: bool) -> Callable[..., Any]:
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    return partial(checkpoint, use_reentrant=use_reentrant)


def test_a_call_without_gradients_does_not_take_them_from_the_next(llama: dr.Reader) -> None:
    push = torch.ones(llama.subject.config.hidden_size, requires_grad=True)
    with llama.editing(dr.Steer(BLOCK, push, alpha=2.0)):
        with torch.no_grad():
            llama.subject(IDS)
        llama.subject(IDS, labels=IDS).loss.backward()
    assert push.grad is not None and bool(push.grad.any())


def test_a_completion_behind_the_prompt_of_a_session_is_no_part_of_it(llama: dr.Reader) -> None:
    """As losses on completions call a model: prompts end together, completions follow."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    last, every = Record(BLOCK, tokens=-1, steps=0), llama.recording(BLOCK)
    session = Session(llama._subject, [], [last], prompt_length=3, tokenizer=llama.tokenizer)
    with torch.no_grad(), session, every as cache:
        llama.subject(torch.cat([IDS, IDS]), attention_mask=mask)
    assert torch.equal(session.activations()[0].tensor[:, 0, 0], cache[BLOCK].tensor[:, 0, 2])


def test_half_precision_logits_of_few_positions_are_made_from_one_piece() -> None:
    half = dr.Reader(decoders.build("LlamaForCausalLM").bfloat16(), decoders.tokenizer())
    pieces: list[bool] = []
    handle = half.subject.lm_head.register_forward_hook(
        lambda module, inputs, output: pieces.append(inputs[0].is_contiguous())
    )
    prompts = ["a red cat", "a blue dog", "two green birds"]
    found = half.run(prompts, logits_to_keep=2, progress=False).output.logits
    assert pieces == [True]
    whole = half.run(prompts, progress=False).output.logits
    torch.testing.assert_close(found, whole[:, -2:], atol=1e-2, rtol=1e-2)
    with torch.no_grad():
        half.subject(IDS.repeat(2, 1), logits_to_keep=2)
    assert pieces[-1] is False  # nothing stays behind, and the plain call is what it was
    handle.remove()
