"""What generate will really do: sampling, seeds, beams; positions of models of every kind."""

import threading
import warnings
from typing import Any

import pytest
import tiny
import torch
from tiny.weights import settle
from transformers.modeling_outputs import BaseModelOutput

from dreamreader.engine import Reader
from dreamreader.engine._generation import Generation
from dreamreader.engine._threads import GENERATORS
from dreamreader.errors import InvalidInput

PROMPTS = ["a red dog", "the small blue house on a tree"]
NEW = {"max_new_tokens": 5, "min_new_tokens": 5}
K: dict[str, Any] = {"vocab_size": 568, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


@pytest.fixture
def reader() -> Reader:
    return Reader(*tiny.language_model("llama"))


def adapted(model: Any) -> Any:
    import peft

    turned = type(model).__name__.startswith("GPT2")  # its projections are no nn.Linear
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["o_proj", "c_proj"], fan_in_fan_out=turned
    )
    with warnings.catch_warnings():  # of the peft version, about transformers' names
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config).eval()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def hidden(model: Any) -> Any:
    """A subclass that hands its arguments on."""

    inner = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner.forward(self, *args, **kwargs)

    model.__class__ = type("Hidden", (inner,), {"forward": forward})
    return model


WRAPPERS = [lambda model: model, adapted, compiled, hidden]


def sampled(reader: Reader, **arguments: Any) -> Any:
    return reader.run(PROMPTS, seeds=[5, 6], **NEW, **arguments)


def test_runs_that_draw_have_the_global_generator_for_themselves(reader: Reader) -> None:
    held: list[bool] = []

    def ask() -> None:
        held.append(not GENERATORS.acquire(blocking=False))
        if not held[-1]:
            GENERATORS.release()

    def called(*_: Any) -> None:
        other = threading.Thread(target=ask)
        other.start()
        other.join()

    reader.subject.register_forward_pre_hook(called)
    sampled(reader, do_sample=True)
    assert all(held) and held
    held.clear()
    sampled(reader, do_sample=False)
    assert not any(held) and held


@pytest.mark.parametrize("how", ["config", "argument", "adapter"])
def test_seeds_decide_whatever_switches_sampling_on(reader: Reader, how: str) -> None:
    from transformers import GenerationConfig

    expected = sampled(reader, do_sample=True).text
    arguments: dict[str, Any] = {}
    model = reader.subject
    if how == "config":
        model.generation_config.do_sample = True
    else:
        config = GenerationConfig(
            do_sample=True, **NEW, **{k: K[k] for k in K if k != "vocab_size"}
        )
        if how == "argument":
            arguments["generation_config"] = config
        else:
            model = adapted(model)
            model.generation_config = config
    run = Reader(model, reader.tokenizer).run
    length = {} if how == "argument" else NEW  # both are not taken together
    for _ in range(2):
        assert run(PROMPTS, seeds=[5, 6], **length, **arguments).text == expected
    assert run(PROMPTS[1], seeds=6, **length, **arguments).text == expected[1:]
    assert expected != sampled(reader, do_sample=False).text


def test_sampling_leaves_the_global_stream_alone(reader: Reader) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampled(reader, do_sample=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["assistant", "lookup"])
def test_assisted_generation_takes_row_by_row(reader: Reader, kind: str) -> None:
    plain = sampled(reader, do_sample=False)
    more: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if kind == "assistant":
        more = {"assistant_model": tiny.language_model("llama")[0]}
    found = sampled(reader, do_sample=False, **more)
    assert found.text == plain.text
    assert found.firing.notes == [
        "the rows ran one by one: assisted generation takes one row at a time"
    ]


def test_beams_give_the_sequences_of_row_after_row(reader: Reader) -> None:
    arguments = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    both = sampled(reader, **arguments)
    assert both.output.shape[0] == len(both.text) == 4 and len(both.rows) == 2
    for row, prompt in enumerate(PROMPTS):
        alone = reader.run(prompt, **NEW, **arguments)
        assert both.text[2 * row : 2 * row + 2] == alone.text
    drawn = sampled(reader, num_return_sequences=2, do_sample=True)
    assert (
        drawn.text[2:]
        == reader.run(PROMPTS[1], seeds=6, num_return_sequences=2, do_sample=True, **NEW).text
    )


def test_arguments_that_generate_refuses_are_told_clearly(reader: Reader) -> None:
    from transformers import DynamicCache, TextStreamer

    for arguments, text in (
        ({"input_ids": torch.tensor([[3]])}, "input_ids is set by the reader: use prompts"),
        ({"max_new_token": 3}, r"generate: .*`model_kwargs` are not used.*'max_new_token'"),
        ({"num_return_sequences": 2, "do_sample": False}, "generate: Greedy methods"),
        ({"num_beams": -1, "max_new_tokens": 2}, "generate: .*negative dimension"),
        ({"max_new_tokens": "a"}, "generate: .*not supported between"),
        ({"logits_to_keep": "a"}, "logits_to_keep is a number of tokens from 0 on.* got 'a'"),
        ({"logits_to_keep": -1}, "logits_to_keep is a number of tokens from 0 on.* got -1"),
        ({"streamer": TextStreamer(reader.tokenizer)}, "a streamer follows one row: run one"),
        ({"past_key_values": DynamicCache(), "do_sample": True}, "one cache, and the rows are run"),
        (
            {"past_key_values": DynamicCache(), "batch_size": 1, "max_length": 20},
            "serves one batch",
        ),
    ):
        with pytest.raises(InvalidInput, match=text):
            reader.run(PROMPTS, **arguments)


def test_a_streamer_follows_one_row(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    streamer = TextStreamer(reader.tokenizer, skip_prompt=True)
    result = reader.run(PROMPTS[0], streamer=streamer, do_sample=False, **NEW)
    assert capsys.readouterr().out.strip() == result.text[0].strip()


def agrees(reader: Reader) -> None:
    """Logits of a short prompt, of a forward and of generate, beside a longer one and alone."""
    both, alone = (reader.run(each).output.logits for each in (PROMPTS, PROMPTS[0]))
    torch.testing.assert_close(both[0, -alone.shape[1] :], alone[0], rtol=1e-4, atol=1e-4)
    ids = reader.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    torch.testing.assert_close(alone, reader.subject(ids).logits, rtol=1e-4, atol=1e-4)
    told = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    both, alone = (reader.run(each, **NEW, **told).output.logits for each in (PROMPTS, PROMPTS[0]))
    for one, other in zip(both, alone, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_do_not_hide_positions(wrap: Any) -> None:
    model, tokenizer = tiny.language_model("gpt2")
    agrees(Reader(wrap(model), tokenizer))


class AtOnce:
    """Ends a text whose prompt begins with a token."""

    def __init__(self, first: int):
        self.first = first

    def __call__(self, ids: Any, scores: Any, **more: Any) -> Any:
        return ids[:, 0] == self.first


def test_what_fills_shorter_texts_is_known_or_asked_for(reader: Reader) -> None:
    ids = reader.tokenizer(["a red dog", "b red dog"]).input_ids
    assert len(ids[0]) == len(ids[1])
    for config in (reader.subject.config, reader.subject.generation_config):
        config.pad_token_id = config.eos_token_id = None
    kw = {"max_new_tokens": 3, "batch_size": 1, "stopping_criteria": [AtOnce(ids[0][0])]}
    run = reader.run(["a red dog", "b red dog"], do_sample=False, **kw)
    assert run.output[0, -2:].tolist() == [reader.tokenizer.pad_token_id] * 2
    reader.tokenizer.pad_token = None
    with pytest.raises(InvalidInput, match="nothing says which token fills the shorter ones"):
        reader.run(["a red dog", "b red dog"], do_sample=False, **kw)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "OPT": {**SMALL, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "Mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    "Roberta": {
        **SMALL,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "is_decoder": True,
    },
}
COUNTING: dict[str, dict[str, Any]] = {
    "Rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "Bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
    },
}


def family(name: str, sizes: dict[str, Any]) -> Reader:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**K, **sizes})
    model = settle(getattr(transformers, f"{name}ForCausalLM")(config), name)
    return Reader(model, tiny.text.byte_tokenizer())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_the_same_alone(name: str) -> None:
    agrees(family(name, FAMILIES[name]))


@pytest.mark.parametrize("name", COUNTING)
def test_models_that_count_padding_are_refused(name: str) -> None:
    reader = family(name, COUNTING[name])
    why = "ForCausalLM counts padding, .* differ by .*; give prompts of one length, or each"
    for arguments in ({}, {**NEW, "do_sample": False}):
        with pytest.raises(InvalidInput, match=why):
            reader.run(PROMPTS, **arguments)
    assert reader.run(["a red dog", "a red cat"]).output.logits.shape[0] == 2


def test_learned_tokens_before_the_prompt_are_tried() -> None:
    """PEFT makes the positions of a tuned prompt itself, and counts padding with them."""
    import peft

    model, tokenizer = tiny.language_model("gpt2")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        reader = Reader(peft.get_peft_model(model, config).eval(), tokenizer)
    with pytest.raises(InvalidInput, match="PeftModelForCausalLM counts padding"):
        reader.run(PROMPTS)
    assert reader.run(PROMPTS[0]).output.logits.shape[1] == 4 + 3


@pytest.mark.parametrize(
    "given",
    [
        {"encoder_outputs": (torch.zeros(3, 5, 8),)},
        {"encoder_outputs": BaseModelOutput(last_hidden_state=torch.zeros(3, 5, 8))},  # pyright: ignore
        {"input_features": torch.zeros(3, 80, 10)},
        {"input_ids": torch.zeros(3, 4).long()},
    ],
)
def test_rows_of_an_encoder_are_those_of_whatever_it_is_given(given: dict[str, Any]) -> None:
    assert Generation.of(given, is_encoder_decoder=True).rows == 3
