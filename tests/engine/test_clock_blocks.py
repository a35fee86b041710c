"""What `recording()` and `editing()` blocks make of rows, of steps on the way and of callbacks."""

import diffusers
import torch

import dreamreader as dr
from dreamreader.engine import Stream

from .. import tiny
from ..tiny.parts import assemble
from .clock_log import call

SITE = "unet.mid_block"
TWO = ["a red cat", "a large blue circle"]


def preview_with(site: str, edits: bool = False):
    """A run with a preview by another pipeline in its callback, and what the UNet gave in each."""
    pipe = tiny.pipeline("sd")
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    other.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    who, seen = ["main"], []

    def preview(pipe, turn, time, tensors):
        if turn == 1:
            who[0] = "preview"
            picture = torch.full((1, 3, 16, 24), 0.5)
            generator = torch.Generator().manual_seed(1)
            other(
                "a star",
                image=picture,
                strength=0.6,
                num_inference_steps=4,
                generator=generator,
                output_type="latent",
            )
            pipe.vae.decode(tensors["latents"])
            who[0] = "main"
        return tensors

    def run() -> list[tuple[str, torch.Tensor]]:
        seen.clear()
        keep = pipe.unet.get_submodule(site).register_forward_hook(
            lambda m, a, out: seen.append((who[0], out.detach().clone()))
        )
        call("sd", pipe, callback_on_step_end=preview)
        keep.remove()
        return list(seen)

    return pipe, run


def test_a_preview_in_a_callback_is_neither_recorded_nor_handed_on() -> None:
    pipe, run = preview_with("mid_block")
    told = []
    stream = Stream(SITE, lambda found: told.append(found.instant.step), branch="cond")
    with torch.no_grad(), dr.Reader(pipe).recording(stream):
        run()
    assert told == [0, 1, 2, 3]
    with dr.Reader(pipe).recording(SITE) as cache:
        seen = run()
    own = [value for who, value in seen if who == "main"]
    assert [who for who, _ in seen] == ["main"] * 2 + ["preview"] * 2 + ["main"] * 2
    found = cache[SITE]
    assert [each.step for each in found.steps] == [0, 1, 2, 3]
    for number, value in enumerate(own):
        got = found.select(branch="cond", step=number).tensor.flatten()
        assert torch.equal(got, value[1].flatten(1).T.flatten())


def test_a_preview_in_a_callback_is_not_edited() -> None:
    pipe, run = preview_with("mid_block")
    plain = run()
    width = plain[0][1].shape[1]
    edit = dr.Steer(SITE, torch.ones(width), alpha=3.0, steps=[3])
    with dr.Reader(pipe).editing(edit) as firing:
        edited = run()
    changed = [not torch.equal(a, b) for (_, a), (_, b) in zip(plain, edited, strict=True)]
    assert changed == [False] * 5 + [True]
    assert firing.firings[0].calls == 1
    # an edit that asks for no step or branch leaves the preview alone too
    with dr.Reader(pipe).editing(dr.Scale("vae.decoder.conv_out", 0.0)) as firing:
        pipe("a red cat", num_inference_steps=1, guidance_scale=1.0, height=16, width=24)
    assert firing.firings[0].calls == 1


def test_rows_of_several_videos_for_each_prompt() -> None:
    pipe = assemble("LTXPipeline", "ltx")
    site = "transformer.transformer_blocks.0.attn2"
    with dr.Reader(pipe).recording(site) as cache:
        pipe(
            TWO,
            num_videos_per_prompt=2,
            height=32,
            width=64,
            num_frames=9,
            num_inference_steps=1,
            max_sequence_length=16,
            output_type="latent",
        )
    assert [(row.index, row.prompt) for row in cache[site].rows] == [
        (0, TWO[0]),
        (1, TWO[0]),
        (2, TWO[1]),
        (3, TWO[1]),
    ]


def test_pndm_from_an_image_has_the_steps_of_text_to_image() -> None:
    pipe = tiny.pipeline("sd")
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    asked = dict(seeds=0, record=SITE, num_inference_steps=7, output_type="latent")
    image = torch.full((1, 3, 16, 24), 0.5)

    def said(run) -> list[tuple]:
        return [(s.timestep, s.step, s.evaluation, s.fraction) for s in run.cache[SITE].steps]

    whole = said(dr.Reader(pipe).run("a red cat", height=16, width=24, **asked))
    part = said(dr.Reader(other).run("a red cat", image=image, strength=0.3, **asked))
    assert part == whole[-3:]
