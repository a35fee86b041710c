"""What carries the name of a class of diffusers is not that class."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import dreamreader as dr
from dreamreader.engine._families import blocks, guidance, places, timestep
from dreamreader.engine._families.classes import entry_of
from dreamreader.engine._families.text import text_sources
from dreamreader.errors import ClockUnknown

from .. import tiny
from .clock_log import logged


class CondFirst(diffusers.StableDiffusionPipeline):
    """A loop of a user's own: the conditional half comes first."""

    @torch.no_grad()
    def __call__(self, prompt, generator=None, guidance_scale=5.0, num_inference_steps=3):
        self._guidance_scale = guidance_scale
        cond, uncond = self.encode_prompt(prompt, "cpu", 1, True)
        text = torch.cat([cond, uncond])
        self.scheduler.set_timesteps(num_inference_steps)
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        x = torch.stack([torch.randn(channels, size, size, generator=g) for g in generator])
        for t in self.scheduler.timesteps:
            both = self.unet(torch.cat([x] * 2), t, encoder_hidden_states=text).sample
            e, u = both.chunk(2)
            x = self.scheduler.step(u + guidance_scale * (e - u), t, x).prev_sample
        return (x,)


def renamed(own: type, name: str) -> type:
    """The class under another name, in its own module."""
    return type(name, (own,), {"__call__": own.__call__, "__module__": __name__})


def test_a_pipeline_called_like_a_known_one_gives_no_branch() -> None:
    own = renamed(CondFirst, "StableDiffusionPipeline")
    pipe = own(**tiny.pipeline("sd").components, requires_safety_checker=False)
    reader = dr.Reader(pipe)
    record = dr.Record("unet.mid_block", branch="cond", steps=[0])
    with pytest.raises(ClockUnknown, match="StableDiffusionPipeline lays out its guidance passes"):
        reader.run(["a red circle", "a blue square"], record=record, seeds=[0, 1])


def test_only_the_class_object_of_diffusers_is_known() -> None:
    known = diffusers.StableDiffusionPipeline
    assert guidance.layout_of(known) is guidance.UNCOND_FIRST
    inherits = type("Mine", (known,), {})
    assert guidance.layout_of(inherits) is guidance.UNCOND_FIRST
    assert guidance.layout_of(renamed(known, "StableDiffusionPipeline")) is None
    # the module's name alone does not make it the class of that module
    posing = type("StableDiffusionPipeline", (nn.Module,), {"__module__": known.__module__})
    assert guidance.layout_of(posing) is None
    mixed = type("Mixin", (), {"__call__": lambda self: None})
    assert guidance.layout_of(type("Mixed", (mixed, known), {})) is None


@pytest.mark.parametrize("kept", ["FluxTransformer2DModel", "Mine"])
def test_a_denoiser_with_a_forward_of_its_own_is_a_stranger(kept: str) -> None:
    known = diffusers.FluxTransformer2DModel
    inherits = type(kept, (known,), {"__module__": __name__})
    own = type(kept, (known,), {"forward": lambda self, x, t: x, "__module__": __name__})
    plain = type(kept, (nn.Module,), {"forward": lambda self, x, t: x, "__module__": __name__})
    assert timestep.form_of(known) is timestep.form_of(inherits) is timestep.thousandth
    for stranger in (own, plain):
        assert timestep.form_of(stranger) is None
    ids = {"img_ids": torch.tensor([[0.0, 1, 2]]), "encoder_hidden_states": torch.zeros(1, 3, 4)}
    assert places.layout(object.__new__(inherits), ids).grid == (2, 3)
    assert places.layout(object.__new__(own), ids).grid is None


def test_text_places_are_those_of_the_class() -> None:
    known = diffusers.SD3Transformer2DModel
    own = type("SD3Transformer2DModel", (known,), {"forward": lambda self, x: x})
    parts = {"text_encoder": object(), "text_encoder_3": object(), "tokenizer_max_length": 77}

    def sources(transformer: type) -> list:
        module = object.__new__(transformer)
        nn.Module.__init__(module)
        return text_sources(SimpleNamespace(transformer=module, **parts), None)

    assert sources(known) == [(("text_encoder",), 0, False), (("text_encoder_3",), 77, False)]
    with pytest.raises(ClockUnknown, match="text_encoder, text_encoder_3.* is not known"):
        sources(own)
    del parts["text_encoder_3"]
    assert sources(own) == [(("text_encoder",), 0, False)]


def test_a_block_called_like_a_known_one_has_one_stream() -> None:
    from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowJointTransformerBlock

    block = object.__new__(AuraFlowJointTransformerBlock)
    assert blocks.streams(block) == {"image": 1, "text": 0}
    own = type("AuraFlowJointTransformerBlock", (nn.Module,), {"forward": lambda self, x: x})
    assert blocks.streams(own()) == {}


def test_an_own_encode_prompt_does_not_say_whom_it_encodes_first() -> None:
    known = diffusers.StableDiffusionPipeline
    own = type("Mine", (known,), {"encode_prompt": lambda self, *a, **k: None})
    assert guidance.encodes_prompt_first(known) and not guidance.encodes_prompt_first(own)
    assert guidance.layout_of(own) is guidance.UNCOND_FIRST  # the loop is diffusers' own


def test_every_name_in_the_tables_is_a_class_of_diffusers() -> None:
    # deprecated modules, and one that its package does not name
    inside = {"WuerstchenPrior", "WuerstchenDiffNeXt", "MultiControlNetUnionModel"}
    tables = (
        guidance._LAYOUTS,
        guidance._ONE_VIDEO,
        timestep._FORMS,
        timestep._CLEAN_TOKENS,
        places._FAMILIES,
    )
    named = {name for table in tables for name in table}
    assert named - set(dir(diffusers)) <= inside
    for name in ("LTXVideoTransformer3DModel", "KandinskyV22Pipeline"):
        own = getattr(diffusers, name)
        assert entry_of(own, {name: 1}, "forward") == 1


def test_a_known_loop_whose_halves_are_swapped_is_noticed() -> None:
    """The embeddings that encode_prompt returned speak against the layout."""
    pipe = tiny.pipeline("sd")
    cat, swapped = torch.cat, []

    def swap(tensors, *args, **kwargs):
        if len(tensors) == 2 and tensors[0].shape == (1, 77, 16) and not swapped:
            swapped.append(True)
            tensors = tensors[::-1]
        return cat(tensors, *args, **kwargs)

    torch.cat = swap
    try:
        said = logged("sd", pipe)
    finally:
        torch.cat = cat
    assert swapped
    assert all(isinstance(each, ClockUnknown) for each in said)
    assert "should be uncond holds the prompt embeddings of cond" in str(said[0])


def test_a_pipeline_that_does_not_state_where_its_text_begins_has_no_words() -> None:
    module = object.__new__(diffusers.QwenImageTransformer2DModel)
    nn.Module.__init__(module)
    pipe = SimpleNamespace(transformer=module, text_encoder=object())
    with pytest.raises(ClockUnknown, match="has no prompt_template_encode_start_idx"):
        text_sources(pipe, None)
    pipe.prompt_template_encode_start_idx = 34
    assert text_sources(pipe, None) == [(("text_encoder",), -34, True)]
