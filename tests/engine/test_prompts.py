"""Prompts of language models: chats, special tokens, empty rows, encoder-decoders, offload."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import tokenizers
from tiny.weights import settle
from torch import Tensor

from dreamreader.edits import Steer
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput

PROMPTS = ["a cat", "a red dog on a tree"]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
CHAT = [{"role": "system", "content": "a red"}, {"role": "user", "content": "dog"}]
TEMPLATE = (
    "{{ bos_token }}{% for each in messages %}{{ each.role }}: {{ each.content }} {% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)
TOKENS = "model.embed_tokens"


def llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**tiny.language.GROUPED, vocab_size=len(tokenizer), bos_token_id=0)
    return settle(LlamaForCausalLM(config), "llama")


@pytest.fixture(scope="module")
def reader() -> Reader:
    tokenizer = tokenizers.byte_level()  # begins every text with <s>
    tokenizer.chat_template = TEMPLATE
    return Reader(llama(tokenizer), tokenizer)


def read(reader: Reader, prompts: Any, **arguments: Any) -> tuple[list[str], list[str]]:
    """Rows as the model got them, pads left out, and the notes of the run."""
    result = reader.run(prompts, record=TOKENS, **arguments)
    weight: Tensor = reader.subject.get_submodule(TOKENS).weight
    rows = (weight == result.cache[TOKENS].tensor[:, 0, :, None]).all(-1).int().argmax(-1)
    shown = [reader.tokenizer.decode(row).replace("<pad>", "") for row in rows]
    return shown, result.firing.notes


def test_a_start_token_is_given_once(reader: Reader) -> None:
    text = reader.tokenizer.apply_chat_template(CHAT, tokenize=False)
    rendered = "<s>system: a red user: dog "
    assert text == rendered
    shown, notes = read(reader, [text, "a cat", text])
    assert shown == [rendered, "<s>a cat", rendered]
    assert notes == [
        "rows 0, 2: the prompt begins with '<s>' already, so the tokenizer's own was left out"
    ]
    assert read(reader, "<s><s> a")[0] == ["<s><s> a"]  # as it was written
    assert read(reader, "a", add_special_tokens=False) == (["a"], [])
    plain = Reader(reader.subject, reader.tokenizer, add_special_tokens=False)
    assert read(plain, "a") == (["a"], [])
    assert read(plain, "a", add_special_tokens=True) == (["<s>a"], [])
    with pytest.raises(InvalidInput, match="add_special_tokens is True or False, got 1"):
        reader.run("a", add_special_tokens=1)


def test_an_end_token_is_given_once() -> None:
    tokenizer = tokenizers.unigram()  # ends every text with </s>
    reader = Reader(llama(tokenizer), tokenizer)
    shown, notes = read(reader, "a cat</s>")
    assert shown[0].count("</s>") == 1 and "ends with '</s>' already" in notes[0]


def test_longer_prompts_are_cut_where_the_reader_says_so(reader: Reader) -> None:
    cut = Reader(reader.subject, reader.tokenizer, max_tokens=3)
    text = "a red dog on a tree"
    first = reader.tokenizer.decode(reader.tokenizer(text)["input_ids"][:3])
    assert read(cut, [text, "a"])[0] == [first, "<s>a"]
    assert read(reader, text)[0] == [f"<s>{text}"]


def test_chat_messages_are_a_prompt(reader: Reader) -> None:
    rendered = "<s>system: a red user: dog bot:"
    assert read(reader, CHAT) == ([rendered], [])
    both = [CHAT, "a cat", CHAT[1:]]
    assert read(reader, both)[0] == [rendered, "<s>a cat", "<s>user: dog bot:"]
    assert reader.run(CHAT).rows[0].prompt == rendered
    edit = Steer("model.layers.1", torch.ones(32), tokens="dog")
    assert reader.run(both[::2], edits=edit).firing[0].rows == {0, 1}


def test_messages_that_make_no_prompt_are_an_error(reader: Reader) -> None:
    bare = Reader(reader.subject, tokenizers.byte_level())
    with pytest.raises(InvalidInput, match="a tokenizer that has a chat_template; give text"):
        bare.run(CHAT)
    with pytest.raises(InvalidInput, match="chat messages are a list, also if there is one"):
        reader.run(CHAT[0])
    with pytest.raises(InvalidInput, match="message 1: a role and a content are needed, got 'x'"):
        reader.run([CHAT[0], "x"])
    strict = tokenizers.byte_level()
    strict.chat_template = "{{ raise_exception('users begin') }}"
    with pytest.raises(InvalidInput, match="the chat template refuses the messages: users begin"):
        Reader(reader.subject, strict).run(CHAT)


def test_a_prompt_without_tokens_or_text_is_refused_by_its_row(reader: Reader) -> None:
    plain = Reader(reader.subject, reader.tokenizer, add_special_tokens=False)
    for prompts, row in (("", 0), (["a", "a cat", ""], 2)):
        with pytest.raises(InvalidInput, match=f"row {row}: the prompt '' has no tokens"):
            plain.run(prompts)
    with pytest.raises(InvalidInput, match=r"prompt 1 is no text: character 2 is '\\ud83d'"):
        reader.run(["a", "a \ud83d b"])


def test_padding_is_needed_only_between_lengths(reader: Reader) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = reader.tokenizer.backend_tokenizer
    bare = Reader(reader.subject, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert (
        bare.run("a cat", seeds=[1, 2], **GREEDY).text == [bare.run("a cat", **GREEDY).text[0]] * 2
    )
    with pytest.raises(InvalidInput, match=r"need padding: set tokenizer.pad_token"):
        bare.run(PROMPTS)


def t5() -> Reader:
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tokenizers.unigram()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Reader(settle(T5ForConditionalGeneration(config), "t5"), tokenizer)


def bart() -> Reader:
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = tokenizers.unigram()
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return Reader(settle(BartForConditionalGeneration(config), "bart"), tokenizer)


@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoders_run_whole(make: Any) -> None:
    reader = make()
    model, tokenizer = reader.subject, reader.tokenizer
    result = reader.run(PROMPTS, **GREEDY)
    logits = reader.run(PROMPTS).output.logits
    start = model.config.decoder_start_token_id
    for row, prompt in enumerate(PROMPTS):
        alone = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(alone, **GREEDY)
        assert result.output[row].tolist() == tokens[0].tolist()
        assert result.text[row] == tokenizer.decode(tokens[0], skip_special_tokens=True)
        expected = model(alone, decoder_input_ids=torch.tensor([[start]])).logits
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-4, atol=1e-5)
    assert any(result.text)
    given = torch.tensor([[start, 5], [start, 6]])
    longer = reader.run(PROMPTS, decoder_input_ids=given).output.logits
    assert longer.shape[:2] == (2, 2)
    torch.testing.assert_close(longer[:, :1], logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"decoder_input_ids: a tensor \[2 rows, tokens\]"):
        reader.run(PROMPTS, decoder_input_ids=given[:1])


def test_an_encoder_decoder_without_a_start_token_is_an_error() -> None:
    reader = t5()
    reader.subject.config.decoder_start_token_id = None
    reader.subject.generation_config.decoder_start_token_id = None
    with pytest.raises(InvalidInput, match="has no decoder_start_token_id in its config; give"):
        reader.run("a cat")


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_models_under_offload_run(reader: Reader, where: str, tmp_path: Path) -> None:
    import accelerate

    model, cpu = llama(reader.tokenizer), torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    assert model.device.type == "meta"
    away = Reader(model, reader.tokenizer)
    expected, found = (
        each.run(PROMPTS, record=TOKENS, edits=Steer("model.layers.1", torch.ones(32)))
        for each in (reader, away)
    )
    assert torch.equal(found.output.logits, expected.output.logits)
    assert torch.equal(found.cache[TOKENS].tensor, expected.cache[TOKENS].tensor)
    assert away.run(PROMPTS, **GREEDY).text == reader.run(PROMPTS, **GREEDY).text


def test_weights_on_the_meta_device_are_an_error(reader: Reader) -> None:
    with torch.device("meta"):
        empty = type(reader.subject)(reader.subject.config)
    with pytest.raises(InvalidInput, match="weights are on the meta device: load them"):
        Reader(empty, reader.tokenizer).run("a cat")
