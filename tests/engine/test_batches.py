"""Rows that are computed in several batches: which arguments go with them, how results join."""

from dataclasses import dataclass
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers.utils import BaseOutput
from PIL import Image

import dreamreader as dr
from dreamreader.errors import InvalidInput

from .. import tiny
from ..tiny.parts import assemble, parts_of

PROMPTS = ["a red bird", "a large blue circle"]
CUT = "cannot be split over batches"


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def _picture(number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    values = numpy.random.default_rng(number).integers(0, 255, (size[1], size[0], 3))
    return Image.fromarray(values.astype("uint8"))


def _both(pipe: Any, prompts: list[str] = PROMPTS, **arguments: Any) -> tuple[Any, Any]:
    """Pictures of one batch, and of batches of one row."""
    reader = dr.Reader(pipe)
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    seeds = [3, 4, 5][: len(prompts)]
    together = reader.run(prompts, seeds=seeds, **arguments)
    apart = reader.run(prompts, seeds=seeds, batch_size=1, **arguments)
    return together.images, apart.images


def _same(one: Any, two: Any) -> None:
    one, two = torch.as_tensor(numpy.asarray(one)), torch.as_tensor(numpy.asarray(two))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_references_of_all_rows_are_not_cut() -> None:
    pipe = assemble("Flux2KleinPipeline", "flux2", is_distilled=True)
    tokens = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    pictures = [_picture(0, (64, 64)), _picture(1, (64, 64))]
    size = {"height": 64, "width": 64, "max_sequence_length": 32}
    together, apart = _both(pipe, image=pictures, **size)
    assert len(set(tokens)) == 1
    _same(together, apart)


@pytest.mark.parametrize(
    "image", [[_picture(0), _picture(1)], _random(2, 3, 16, 24), _random(2, 16, 24, 3).numpy()]
)
def test_pictures_of_known_classes_go_with_their_rows(image: Any) -> None:
    pipe = tiny.pipeline("sd-img2img")
    together, apart = _both(pipe, image=image, strength=0.9)
    _same(together, apart)
    arguments = {"strength": 0.9, "num_inference_steps": 2, "output_type": "latent"}
    other = dr.Reader(pipe).run(PROMPTS[1], seeds=4, image=image[1:], **arguments)
    _same(other.images, apart[1:])


def test_one_picture_for_three_rows_is_not_cut_into_its_channels() -> None:
    prompts = [*PROMPTS, "a small tree"]
    pipe = tiny.pipeline("sd-img2img")
    _same(*_both(pipe, prompts, image=_random(3, 16, 24), strength=0.9))


def test_latents_and_negative_prompts_go_with_their_rows() -> None:
    negative = ["a dog", "a house"]
    arguments = {**tiny.arguments("sd", 2), "negative_prompt": negative}
    together, apart = _both(tiny.pipeline("sd"), latents=_random(2, 4, 8, 12), **arguments)
    assert not torch.equal(together[0], together[1])
    _same(together, apart)
    with pytest.raises(InvalidInput, match="latents: has 3 entries, the run has 2 rows"):
        _both_apart("sd", latents=_random(3, 4, 8, 12))


def _both_apart(name: str, **arguments: Any) -> Any:
    pipe = tiny.pipeline(name)
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    given = {**tiny.arguments(name, 2), "output_type": "latent", **arguments}
    try:
        return dr.Reader(pipe).run(PROMPTS, seeds=0, batch_size=1, **given)
    except InvalidInput:
        assert calls == []  # nothing was computed
        raise


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ip_adapter_image", [_picture(0), _picture(1)]),
        ("ip_adapter_image_embeds", [_random(4, 1, 16)]),
        ("cross_attention_kwargs", {"boxes": _random(2, 4)}),
    ],
)
def test_an_argument_that_could_be_either_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"{name}: .*{CUT}"):
        _both_apart("sd", **{name: value})


def test_batches_of_pictures_in_a_list_are_refused() -> None:
    with pytest.raises(InvalidInput, match=CUT):
        _both_apart("sd-img2img", image=[_random(2, 3, 16, 24)])


def test_pictures_of_several_controlnets_are_refused() -> None:
    parts = parts_of("sd-control")
    pipe = assemble("StableDiffusionControlNetPipeline", "sd", controlnet=[parts["controlnet"]] * 2)
    pictures = [_picture(0), _picture(1)]  # one for each network, not for each row
    with pytest.raises(InvalidInput, match=CUT):
        dr.Reader(pipe).run(PROMPTS, image=pictures, seeds=0, batch_size=1)
    arguments = {**tiny.arguments("sd", 2), "output_type": "latent"}
    assert len(dr.Reader(pipe).run(PROMPTS, image=pictures, seeds=0, **arguments).images) == 2


def test_lists_of_numbers_and_names_stay_whole() -> None:
    arguments = {
        "original_size": (16, 24),
        "crops_coords_top_left": (0, 0),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    assert len(_both_apart("sdxl", **arguments).images) == 2


def test_a_system_prompt_is_one_text() -> None:
    arguments = {"system_prompt": "You are an assistant", "negative_prompt": "a dog"}
    assert len(_both_apart("lumina2", **arguments).images) == 2


def _made_of(own: type) -> Any:
    pipe = own(**tiny.pipeline("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Stranger(diffusers.StableDiffusionPipeline):
    """A loop of its own: whether pictures belong to rows is not known."""

    def __call__(self, prompt, image=None, generator=None, steps=2, output_type="latent"):
        return super().__call__(
            prompt, generator=generator, num_inference_steps=steps, output_type=output_type
        )


def test_a_class_with_a_loop_of_its_own_is_not_known() -> None:
    reader = dr.Reader(_made_of(Stranger))
    with pytest.raises(InvalidInput, match=f"whether Stranger takes one .*{CUT}"):
        reader.run(PROMPTS, image=[_picture(0), _picture(1)], seeds=0, batch_size=1)
    assert len(reader.run(PROMPTS, seeds=0, batch_size=1).images) == 2


@dataclass
class OddPipelineOutput(BaseOutput):
    """What no batches can be joined of."""

    score: torch.Tensor


class Odd(diffusers.StableDiffusionPipeline):
    def __call__(self, prompt, generator=None):
        calls.append(len(prompt))
        return OddPipelineOutput(score=torch.zeros(3))


class Average(Stranger):
    def __call__(self, prompt, generator=None):
        return (super().__call__(prompt, generator=generator).images.mean(),)


calls: list[int] = []


def test_results_that_cannot_be_joined_are_refused_before_or_at_the_first_batch() -> None:
    reader = dr.Reader(_made_of(Odd))
    with pytest.raises(InvalidInput, match="Odd gives OddPipelineOutput, whose rows cannot be"):
        reader.run(PROMPTS, seeds=0, batch_size=1)
    assert calls == []
    assert reader.run(PROMPTS, seeds=0).output.score.shape == (3,)
    with pytest.raises(InvalidInput, match="of None entries for a batch of 1 rows"):
        dr.Reader(_made_of(Average)).run(PROMPTS, seeds=0, batch_size=1)


@pytest.mark.parametrize("kind", ["latent", "np", "pt", "pil"])
def test_videos_are_joined_in_the_order_of_rows(kind: str) -> None:
    size = {"height": 16, "width": 32, "num_frames": 3, "max_sequence_length": 16}
    pipe = assemble("WanPipeline", "wan")
    together, apart = _both(pipe, output_type=kind, **size)
    assert len(together) == len(apart) == 2
    if kind == "pil":
        assert [len(video) for video in apart] == [3, 3]
        together, apart = (
            [[numpy.asarray(f) / 255 for f in v] for v in e] for e in (together, apart)
        )
        assert numpy.abs(numpy.asarray(together) - numpy.asarray(apart)).max() < 0.02
        return
    assert type(together) is type(apart)
    _same(together, apart)


def test_embeddings_of_a_prior_are_joined() -> None:
    pipe = assemble("KandinskyV22PriorPipeline", "kandinsky-prior")
    together, apart = _both(pipe, output_type="pt")
    assert together.shape[0] == 2
    _same(together, apart)


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_several_for_each_prompt_are_rows(kind: str) -> None:
    pipe = tiny.pipeline("sd") if kind == "images" else assemble("WanPipeline", "wan")
    with pytest.raises(InvalidInput, match=f"every {kind[:-1]} is a row; give seeds=range"):
        dr.Reader(pipe).run(PROMPTS, seeds=0, **{f"num_{kind}_per_prompt": 2})


def test_rows_of_an_edit_may_be_in_any_batch() -> None:
    reader = dr.Reader(tiny.pipeline("sd"))
    arguments = {**tiny.arguments("sd", 2), "seeds": [3, 4], "output_type": "latent"}
    plain = reader.run(PROMPTS, batch_size=1, **arguments)
    edit = dr.Scale("unet.mid_block", 0.5, rows=[1])
    found = reader.run(PROMPTS, edits=edit, batch_size=1, **arguments)
    assert found.firing[0].rows == {1}
    assert torch.equal(found.images[0], plain.images[0])
    assert not torch.equal(found.images[1], plain.images[1])


def test_rows_run_one_by_one_where_texts_are_cut_to_the_longest() -> None:
    pipe = assemble("LattePipeline", "latte")
    arguments = {"height": 16, "width": 24, "video_length": 2, "clean_caption": False}
    together, apart = _both(pipe, **arguments)
    assert torch.equal(together, apart)
    found = dr.Reader(pipe).run(
        PROMPTS, seeds=0, num_inference_steps=2, output_type="latent", **arguments
    )
    assert "rows ran one by one" in found.firing.notes[0]
