"""The lens against hidden states that are normed by hand and given as prompt embeddings."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.localise import ablate_edits, lens, lens_cells

PROMPTS, SEEDS = ["a red cat", "a dog on a tree"], [5, 6]


def settings(name: str) -> dict[str, Any]:
    return {**tiny.arguments(name), "output_type": "pt"}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def check(found: Any, layer: int, truth: Tensor, plain: Tensor) -> None:
    rows = [n for n, each in enumerate(found.layers) if each == layer]
    effect = float((truth - plain).abs().max())
    assert effect > 1e-3
    assert float((found.images[rows] - truth).abs().max()) < 1e-3 * effect


def test_stable_diffusion_reads_normed_states() -> None:
    reader, kw = Reader(tiny.pipeline("sd")), settings("sd")
    pipe = reader.subject
    for _ in range(2):  # transformers installs hooks of its own at the first such call
        found = lens(reader, PROMPTS, seeds=SEEDS, **kw)
        assert found.layers == (0, 0, 1, 1, 2, 2)
        assert [row.index for row in found.rows] == [0, 1] * 3
        plain = reader.run(PROMPTS, seeds=SEEDS, **kw).images
        ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            states = pipe.text_encoder(ids.input_ids, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            embeds = pipe.text_encoder.final_layer_norm(states[layer])
            truth = pipe(prompt_embeds=embeds, generator=generators(), **kw).images
            check(found, layer, truth, plain)
        torch.testing.assert_close(found.images[4:], plain, rtol=0, atol=1e-5)


def test_t5_reads_normed_states() -> None:
    reader, kw = Reader(tiny.pipeline("pixart-sigma")), settings("pixart-sigma")
    pipe = reader.subject
    found = lens(reader, PROMPTS, seeds=SEEDS, **kw)
    plain = reader.run(PROMPTS, seeds=SEEDS, **kw).images
    _, mask, negative, negative_mask = pipe.encode_prompt(
        PROMPTS, max_sequence_length=16, clean_caption=False
    )
    ids = pipe.tokenizer(
        PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = pipe.text_encoder(
            ids.input_ids, attention_mask=ids.attention_mask, output_hidden_states=True
        ).hidden_states
    for layer in (0, 1):
        truth = pipe(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=pipe.text_encoder.encoder.final_layer_norm(states[layer]),
            prompt_attention_mask=mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=negative_mask,
            generator=generators(),
            **kw,
        ).images
        check(found, layer, truth, plain)


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_one_of_two_encoders_is_read_and_the_other_left(encoder: str) -> None:
    """SDXL takes hidden_states[-2] without a norm, and the pooled vector of the second encoder."""
    reader, kw = Reader(tiny.pipeline("sdxl")), settings("sdxl")
    pipe = reader.subject
    plain = reader.run(PROMPTS, seeds=SEEDS, **kw).images
    found = lens(reader, PROMPTS, encoder=encoder, seeds=SEEDS, **kw)
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
    tokenizer = pipe.tokenizer if encoder == "text_encoder" else pipe.tokenizer_2
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    model = getattr(pipe, encoder)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            if encoder == "text_encoder":
                text = torch.cat([states[layer], embeds[..., 16:]], -1)
            else:
                text = torch.cat([embeds[..., :16], states[layer]], -1)
                normed = model.text_model.final_layer_norm(states[layer])
                ends = (ids == model.config.eos_token_id).int().argmax(-1)
                pooled = model.text_projection(normed[torch.arange(2), ends])
            truth = pipe(
                prompt_embeds=text,
                negative_prompt_embeds=negative,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=negative_pooled,
                generator=generators(),
                **kw,
            ).images
            rows = [n for n, each in enumerate(found.layers) if each == layer]
            torch.testing.assert_close(found.images[rows], truth, rtol=0, atol=1e-4)
    assert float((found.images[:2] - plain).abs().max()) > 1e-3
    torch.testing.assert_close(found.images[4:], plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, encoder",
    [("sd3", "text_encoder_3"), ("flux", "text_encoder_2"), ("sana", "text_encoder")],
)
def test_encoders_of_other_families_are_read_too(name: str, encoder: str) -> None:
    reader, kw = Reader(tiny.pipeline(name)), settings(name)
    found = lens(reader, PROMPTS[0], encoder=encoder, seeds=5, **kw)
    plain = reader.run(PROMPTS[0], seeds=5, **kw).images
    assert found.layers == (0, 1, 2)
    moved = [float((image - plain[0]).abs().max()) for image in found.images]
    assert min(moved[:2]) > 1e-4 and moved[2] < 1e-5


def test_the_negative_prompt_stays_as_it_is() -> None:
    reader, kw = Reader(tiny.pipeline("sd")), settings("sd")
    cells = lens_cells(reader, layers=[0])
    site = "text_encoder.final_layer_norm"
    plain = reader.run("a red cat", record=site, seeds=5, **kw).cache[site]
    edits = ablate_edits(cells, "zero")
    read = reader.run("a red cat", edits=edits, record=site, seeds=5, **kw).cache[site]
    assert torch.equal(read.select(branch="uncond").tensor, plain.select(branch="uncond").tensor)
    assert not torch.equal(read.select(branch="cond").tensor, plain.select(branch="cond").tensor)


def test_deep_encoders_are_read_at_every_fourth_layer() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny.pipeline("sd")
    old = pipe.text_encoder.config.to_dict()
    config = CLIPTextConfig(**{**old, "num_hidden_layers": 13})
    pipe.text_encoder = CLIPTextModel(config).eval()
    cells = lens_cells(Reader(pipe))
    assert [cell.name.split()[-1] for cell in cells] == ["0", "4", "8", "12", "13"]
    assert [len(cell.sites) for cell in cells] == [26, 18, 10, 2, 0]


def test_bad_input() -> None:
    reader = Reader(tiny.pipeline("sd"))
    with pytest.raises(UnknownName, match="unknown text encoder 'text_encoder_2'; nearest: text_e"):
        lens(reader, "a", encoder="text_encoder_2")
    with pytest.raises(InvalidInput, match=r"text_encoder has layers 0 .. 2, got 3"):
        lens_cells(reader, layers=[3])
    with pytest.raises(InvalidInput, match="got no layers"):
        lens_cells(reader, layers=[])
    with pytest.raises(InvalidInput, match="rows do not fit"):
        lens(reader, ["a", "b"], seeds=[1, 2, 3])
    assert np.asarray(lens_cells(reader, layers=[-1])[0].sites).size == 0
