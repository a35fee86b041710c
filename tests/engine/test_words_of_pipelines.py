"""A word is one of the prompt that the tokens at a site come from."""

from typing import Any

import pytest
import torch

import dreamreader as dr
from dreamreader.errors import ClockUnknown, InvalidInput

from .. import tiny
from ..tiny.parts import assemble
from .matrix_pipelines import FAMILIES

SDXL = "unet.mid_block.attentions.0.transformer_blocks.0.attn2:k"
JOINT = "transformer.transformer_blocks.0.attn.add_k_proj"


def _settings(name: str) -> dict[str, Any]:
    return {**tiny.arguments(name, 2), "output_type": "latent"}


def _at(reader: dr.Reader, record: dr.Record, name: str, prompt: str, **kwargs: Any) -> Any:
    found = reader.run(prompt, record=record, seeds=0, **_settings(name), **kwargs)
    return found.cache[record.site]


def _tokens(pipe: Any, number: str, text: str, word: str) -> list[int]:
    """Where a word of one token stands, by the tokenizer of the encoder."""
    tokenizer = getattr(pipe, f"tokenizer{number}")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    return [at for at, each in enumerate(pieces) if each.strip("\u2581").split("<")[0] == word]


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_word_of_two_prompts_side_by_side_is_refused(name: str) -> None:
    reader = dr.Reader(tiny.pipeline(name))
    site = SDXL if name == "sdxl" else JOINT
    record = dr.Record(site, tokens="bird", branch="cond")
    one = _at(reader, record, name, "a red bird")
    assert torch.equal(
        one.tensor, _at(reader, record, name, "a red bird", prompt_2="a red bird").tensor
    )
    for other in ("a bird", "a red dog", "bird and a dog"):
        with pytest.raises(InvalidInput, match="text_encoder_2 .* side by side: give one text"):
            _at(reader, record, name, "a red bird", prompt_2=other)
    width = one.shape[-1]
    push = dr.Steer(site, torch.ones(width), alpha=1.0, tokens="bird", branch="cond")
    with pytest.raises(InvalidInput, match="side by side"):
        reader.run("a red bird", edits=push, prompt_2="a bird", seeds=0, **_settings(name))


def test_a_word_stands_where_each_encoder_of_sd3_has_it() -> None:
    pipe = tiny.pipeline("sd3")
    reader, site = dr.Reader(pipe), JOINT
    texts = {"prompt_3": "the bird and a red bird"}
    found = _at(reader, dr.Record(site, tokens="bird", branch="cond"), "sd3", "a red bird", **texts)
    whole = _at(reader, dr.Record(site, branch="cond"), "sd3", "a red bird", **texts)
    clip = pipe.tokenizer_max_length
    at = _tokens(pipe, "", "a red bird", "bird")
    at += [clip + each for each in _tokens(pipe, "_3", texts["prompt_3"], "bird")]
    assert len(at) == 3 and torch.equal(found.tensor, whole.tensor[..., at, :])


def test_words_of_flux_are_those_of_its_second_prompt() -> None:
    pipe = tiny.pipeline("flux")
    reader, site = dr.Reader(pipe), JOINT
    record = dr.Record(site, tokens="bird", branch="cond")
    found = _at(reader, record, "flux", "a bird", prompt_2="a large red bird")
    whole = _at(reader, dr.Record(site), "flux", "a bird", prompt_2="a large red bird")
    at = _tokens(pipe, "_2", "a large red bird", "bird")
    assert torch.equal(found.tensor, whole.tensor[..., at, :])
    with pytest.raises(InvalidInput, match="'bird' is not in the prompt of row 0: 'a dog'"):
        _at(reader, record, "flux", "a bird", prompt_2="a dog")


def test_text_encoders_have_the_words_of_their_own_prompts() -> None:
    reader = dr.Reader(tiny.pipeline("sdxl"))
    for encoder, word, other in (
        ("text_encoder", "bird", "dog"),
        ("text_encoder_2", "dog", "bird"),
    ):
        site = next(e for e in reader.sites(f"{encoder}.**").names if e.endswith("layers.0.mlp"))
        record = dr.Record(site, tokens=word, branch="cond")
        assert _at(reader, record, "sdxl", "a red bird", prompt_2="a red dog").shape[-2] == 1
        wrong = dr.Record(site, tokens=other, branch="cond")
        with pytest.raises(InvalidInput, match=f"{other!r} is not in the prompt of row 0"):
            _at(reader, wrong, "sdxl", "a red bird", prompt_2="a red dog")


def test_a_template_in_front_of_the_prompt_moves_its_words() -> None:
    pipe = assemble("HunyuanVideoPipeline", "hunyuan-video")
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    arguments |= FAMILIES["hunyuan-video"].arguments
    site = JOINT
    with pytest.raises(ClockUnknown, match="not known"):
        record = dr.Record(site, tokens="circle")
        dr.Reader(pipe).run("a large blue circle", record=record, seeds=0, **arguments)


def test_words_of_a_negative_prompt_that_the_caller_embedded_are_not_known() -> None:
    pipe = tiny.pipeline("sd")
    with torch.no_grad():
        _, negative = pipe.encode_prompt("a cat", "cpu", 1, True, "a red bird")
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    given = {"negative_prompt_embeds": negative, "negative_prompt": None, "seeds": 0}
    settings = {**_settings("sd"), **given}
    cond = dr.Record(site, tokens="red", branch="cond")
    assert dr.Reader(pipe).run("a red bird", record=cond, **settings).cache[site].shape[-2] == 1
    push = dr.Steer(site, torch.ones(32), alpha=1.0, tokens="red")
    with pytest.raises(ClockUnknown, match="tokens of the prompt .uncond. are not known"):
        dr.Reader(pipe).run("a red bird", edits=push, **settings)


def test_a_word_of_the_negative_prompt_alone() -> None:
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    record = dr.Record(site, tokens="red", branch="uncond")
    settings = {**_settings("sd"), "negative_prompt": "a red bird", "seeds": 0}
    found = dr.Reader(tiny.pipeline("sd")).run("a dog", record=record, **settings).cache[site]
    whole = dr.Reader(tiny.pipeline("sd")).run("a dog", record=site, **settings).cache[site]
    assert torch.equal(found.tensor, whole.select(branch="uncond").tensor[..., 2:3, :])
