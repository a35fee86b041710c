"""Words of prompts: every alphabet, every kind of tokenizer, with the prompt and from tokens."""

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from tiny import text, tokenizers

from dreamreader.engine import Reader, Record
from dreamreader.engine._spelling import _by_decoding, _is_space, spell, word_positions
from dreamreader.errors import InvalidInput

FOUND = [
    (0, "crème", 1),
    (0, "CRE\u0300ME", 1),
    (0, "a", 2),
    (0, "cat", 1),
    (1, "кот", 1),
    (1, "стуле", 1),
    (2, "猫", 2),
    (2, "好き", 1),
    (3, "كِتَاب", 1),
    (4, "👍🏽", 1),
    (4, "👨‍👩‍👧", 1),
    (5, "แมว", 1),
    (6, "बिल्ली", 1),
    (7, "고양이", 1),
    (8, "crème", 1),
    (9, "don't", 1),
    (9, "well-known", 1),
    (9, "C++", 1),
    (9, "red dog", 1),
]
ABSENT = [
    (0, "cr"),
    (0, "creme"),
    (1, "стул"),
    (3, "كتاب"),
    (4, "👍"),
    (4, "👨"),
    (6, "बिल्ल"),
    (7, "고양"),
]


@pytest.fixture(scope="module", params=[*tokenizers.KINDS, text.clip_tokenizer])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    make: Callable[[], Any] = request.param
    return make()


def _plain(shown: str) -> str:
    return unicodedata.normalize("NFKD", shown).casefold().replace(" ", "")


def _without_marks(word: str) -> str:
    """As BERT has it."""
    letters = unicodedata.normalize("NFD", word.casefold())
    return _plain("".join(e for e in letters if unicodedata.category(e) not in ("Mn", "Cf")))


@pytest.mark.parametrize(("sentence", "word", "times"), FOUND)
def test_words_of_every_script(tokenizer: Any, sentence: int, word: str, times: int) -> None:
    prompt = tokenizers.SENTENCES[sentence]
    ids = tokenizer(prompt).input_ids
    hits = word_positions(tokenizer, ids, word, prompt)
    spelled = [_plain(tokenizer.decode([ids[at] for at in hits]))]
    for left_out in (at for at in hits if not _is_space(tokenizer, ids[at])):
        spelled.append(_plain(tokenizer.decode([ids[at] for at in hits if at != left_out])))
    form = _without_marks(word) if tokenizer.cls_token == "[CLS]" else _plain(word)
    counts = [each.count(form) for each in spelled]
    assert counts[0] == times and max(counts[1:]) < times  # all that are needed, and no more
    assert word_positions(tokenizer, ids, word) == hits  # from the tokens alone


@pytest.mark.parametrize(("sentence", "word"), ABSENT)
def test_parts_of_words_are_no_words(tokenizer: Any, sentence: int, word: str) -> None:
    prompt = tokenizers.SENTENCES[sentence]
    assert word_positions(tokenizer, tokenizer(prompt).input_ids, word, prompt) == []


def test_decoding_one_by_one_covers_the_text(tokenizer: Any) -> None:
    """The characters of all tokens are those of the offsets, however they are found."""
    if not tokenizer.is_fast:
        pytest.skip("there are no offsets to compare with")
    for prompt in tokenizers.SENTENCES:
        ids = tokenizer(prompt).input_ids
        told, grown = spell(tokenizer, ids), _by_decoding(tokenizer, ids)
        for number, each in enumerate(ids):
            if _is_space(tokenizer, each):
                continue
            a, b = (
                "" if one.spans[number] is None else one.text[slice(*one.spans[number])].strip()
                for one in (told, grown)
            )
            assert a == b, (prompt, number)


def test_a_word_that_has_no_token_of_its_own() -> None:
    tokenizer = text.t5_tokenizer()
    prompt = "a красный cat"
    ids = tokenizer(prompt).input_ids
    [unknown] = word_positions(tokenizer, ids, "красный", prompt)
    assert ids[unknown] == tokenizer.unk_token_id
    assert word_positions(tokenizer, ids, "красный") == []  # the tokens alone do not tell


def test_cut_and_padded_rows() -> None:
    tokenizer = tokenizers.byte_level()
    prompt = tokenizers.SENTENCES[0]
    ids = tokenizer(prompt).input_ids
    pads = [tokenizer.pad_token_id] * 3
    whole = word_positions(tokenizer, ids, "crème", prompt)
    assert word_positions(tokenizer, pads + ids, "crème", prompt) == [3 + at for at in whole]
    cut = ids[: whole[-1] + 1]
    assert word_positions(tokenizer, cut + pads, "crème", prompt) == whole
    assert word_positions(tokenizer, cut + pads, "mat", prompt) == []


def test_another_prompt_than_that_of_the_tokens_is_not_used() -> None:
    tokenizer = tokenizers.byte_level()
    ids = tokenizer("a cat on the mat").input_ids
    right = word_positions(tokenizer, ids, "cat")
    assert right and word_positions(tokenizer, ids, "cat", "the cat, the cat, the cat") == right


def test_special_tokens_are_no_words() -> None:
    tokenizer = tokenizers.byte_level()
    ids = tokenizer("<s> a cat").input_ids
    assert word_positions(tokenizer, ids, "s", "<s> a cat") == []
    with pytest.raises(InvalidInput, match="a word of the prompt"):
        word_positions(tokenizer, ids, " ")


def test_a_model_finds_the_word_and_names_the_prompt() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizers.byte_level()
    sizes = {**tiny.language.GROUPED, "vocab_size": len(tokenizer), "bos_token_id": 1}
    reader = Reader(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), tokenizer)
    prompts = ["a crème on the mat", "Кот ел crème и ел"]
    site = "model.embed_tokens"
    found = reader.run(prompts, record=Record(site, tokens="crème")).cache[site].tensor[:, 0]
    for row, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
        hits = word_positions(tokenizer, ids.tolist(), "crème", prompt)
        assert len(hits) > 1
        assert (found[row] == reader.subject.model.embed_tokens.weight[ids[hits]]).all()
    with pytest.raises(InvalidInput, match=r"'ел' is not in the prompt of row 0: 'a crème on the"):
        reader.run(prompts, record=Record(site, tokens="ел"))
    with (
        pytest.raises(InvalidInput, match="'dog' is not in the prompt of row 0: 'a crème on"),
        reader.recording(site, tokens="dog"),
    ):
        reader.subject(tokenizer(prompts[0], return_tensors="pt").input_ids)


def test_a_pipeline_finds_words_beyond_ascii_in_every_prompt() -> None:
    pipe = tiny.pipeline("sd")
    reader, arguments = Reader(pipe), tiny.arguments("sd", 1)
    site = "text_encoder.**.layers.0.self_attn:k"
    prompts = ["a crème cat", "猫 on a crème"]
    common = {"seeds": 0, "output_type": "latent", **arguments}
    rows = reader.run(prompts, record=Record(site, tokens="CRÈME", branch="cond"), **common).cache
    whole = reader.run(prompts, record=Record(site, branch="cond"), **common).cache
    [name] = rows
    for row, prompt in enumerate(prompts):
        ids = pipe.tokenizer(prompt).input_ids
        hits = word_positions(pipe.tokenizer, ids, "crème", prompt)
        assert pipe.tokenizer.decode([ids[at] for at in hits]).strip() == "crème"
        assert (rows[name].tensor[row, 0] == whole[name].tensor[row, 0, hits]).all()
    with pytest.raises(InvalidInput, match="'猫' is not in the prompt of row 0: 'a crème cat'"):
        reader.run(prompts, record=Record(site, tokens="猫", branch="cond"), **common)
