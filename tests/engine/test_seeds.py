"""The seed of a row decides its picture, with every scheduler and in every batch."""

import random

import diffusers
import numpy
import pytest
import torch

import dreamreader as dr
from dreamreader.engine import Stream
from dreamreader.errors import InvalidInput

from .. import tiny
from ..tiny.embedded import untrained

# neither a UNet in latents nor an SD3 can be driven by these, or they want a library
_OTHERS = set(
    "Amused BlockRefinement CogVideoXDPM CosineDPMSolverMultistep DDPMWuerstchen DiscreteDDIM "
    "DPMSolverSDE EntropyBound HeliosDMD Helios KarrasVe LMSDiscrete Piflow RFD4Proteina RePaint "
    "SCM ScoreSdeVe UnCLIP VQDiffusion".split()
)
_FLOW = set(
    "FlowMapEulerDiscrete FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM".split()
)
_FLOW |= {"LTXEulerAncestralRF", "MiniMaxH3"}
_NAMES = [
    each.removesuffix("Scheduler")
    for each in dir(diffusers)
    if each.endswith("Scheduler") and isinstance(getattr(diffusers, each), type)
]
# these draw from the global generators in a pipeline that hands its scheduler none
_DRAWING = set("DDPM EulerAncestralDiscrete KDPM2AncestralDiscrete LCM SASolver TCD".split())
_DRAWING |= {"FlowMatchLCM", "LTXEulerAncestralRF", "CMStochasticIterative", "DDPMParallel"}
CASES = [("shapes-unet", name) for name in _NAMES if name not in _OTHERS | _FLOW]
CASES += [("shapes-dit", name) for name in _NAMES if name in _FLOW | _DRAWING]
CASES += [("shapes-dit", "FlowMatchEulerDiscrete, stochastic_sampling")]
PROMPTS = ["a red circle", "a blue square"]
SITE = {"shapes-unet": "unet.mid_block", "shapes-dit": "transformer.transformer_blocks.0.attn"}


def _pipe(model: str, scheduler: str):
    pipe = untrained(model)
    name, _, option = scheduler.partition(", ")
    config = {option: True} if option else {"skip_prk_steps": True} if name == "PNDM" else {}
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(
        pipe.scheduler.config, **config
    )
    return pipe


def _settings(steps: int = 3) -> dict:
    return {**dr.zoo.settings(num_inference_steps=steps), "output_type": "latent"}


def _states() -> tuple:
    numbers = numpy.random.get_state()
    return torch.get_rng_state().tolist(), numbers[1].tolist(), numbers[2], random.getstate()


@pytest.mark.filterwarnings("ignore")  # configurations that other schedulers do not know
@pytest.mark.parametrize(("model", "scheduler"), CASES)
def test_a_seed_decides_its_picture(model: str, scheduler: str) -> None:
    reader = dr.Reader(_pipe(model, scheduler))
    before = _states()
    both = reader.run(PROMPTS, record=SITE[model], seeds=[4, 7], **_settings())
    width = both.cache[SITE[model]].shape[-1]
    nothing = [dr.Steer(SITE[model], torch.ones(width), alpha=0.0), dr.Scale(SITE[model], 1.0)]
    again = reader.run(PROMPTS, edits=nothing, seeds=[4, 7], **_settings())
    alone = reader.run(PROMPTS[1], seeds=7, **_settings())
    assert _states() == before
    assert torch.equal(both.images, again.images)
    scale = float(both.images.abs().max())
    torch.testing.assert_close(both.images[1:], alone.images, rtol=1e-3, atol=1e-3 * scale)
    draws = model == "shapes-dit" and scheduler.partition(",")[0] in _DRAWING or "," in scheduler
    assert any("global random generators" in note for note in both.firing.notes) == draws


def test_rows_that_share_a_generator_are_run_one_by_one() -> None:
    scheduler = "FlowMatchEulerDiscrete, stochastic_sampling"
    reader = dr.Reader(_pipe("shapes-dit", scheduler))
    site = SITE["shapes-dit"]
    found = reader.run(PROMPTS, record=site, seeds=[4, 7], **_settings())
    assert found.cache[site].shape[0] == 2
    assert found.firing.notes[0].startswith("FlowMatchEulerDiscreteScheduler.step ")
    apart = reader.run(PROMPTS, record=site, seeds=[4, 7], batch_size=1, **_settings())
    assert torch.equal(found.images, apart.images)
    assert torch.equal(found.cache[site].tensor, apart.cache[site].tensor)
    assert apart.firing.notes == []
    # the noise of a step is not the noise that the row began with
    other = reader.run(PROMPTS, seeds=[4, 8], **_settings())
    assert torch.equal(found.images[0], other.images[0])
    assert not torch.equal(found.images[1], other.images[1])


def test_functions_of_the_caller_are_not_called_twice() -> None:
    reader = dr.Reader(_pipe("shapes-dit", "FlowMatchLCM"))
    calls = []

    def count(pipe, step, time, tensors):
        calls.append(step)
        return tensors

    with pytest.raises(InvalidInput, match="FlowMatchLCMScheduler.step .* give batch_size=1"):
        reader.run(PROMPTS, seeds=0, callback_on_step_end=count, **_settings(9))
    assert calls == [0]  # at the first step, not after the run
    stream = Stream(SITE["shapes-dit"], lambda flowing: None)
    with pytest.raises(InvalidInput, match="Stream.* would be called twice"):
        reader.run(PROMPTS, record=stream, seeds=0, **_settings())
    calls.clear()
    arguments = {"callback_on_step_end": count, **_settings()}
    found = reader.run(PROMPTS, seeds=0, batch_size=1, **arguments)
    assert calls == [0, 1, 2] * 2
    assert torch.equal(found.images, reader.run(PROMPTS, seeds=0, **_settings()).images)


def test_a_dropout_in_train_mode_is_named() -> None:
    pipe = untrained("shapes-unet")
    name, dropout = next(
        (name, each)
        for name, each in pipe.unet.named_modules()
        if isinstance(each, torch.nn.Dropout)
    )
    dropout.p = 0.5
    dropout.train()
    reader = dr.Reader(pipe)
    found = reader.run(PROMPTS, seeds=[4, 7], **_settings(2))
    assert any(f"unet.{name} (Dropout in train mode" in note for note in found.firing.notes)
    assert torch.equal(found.images, reader.run(PROMPTS, seeds=[4, 7], **_settings(2)).images)


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand, lambda: torch.rand(1)])
def test_every_global_generator_is_watched_and_seeded(draw) -> None:
    """A pipeline that draws before its first step, and one that draws after its last."""

    class Early(diffusers.StableDiffusionPipeline):
        def prepare_latents(self, *args, **kwargs):
            return super().prepare_latents(*args, **kwargs) * (1 + float(draw()))

    class Late(diffusers.StableDiffusionPipeline):
        def maybe_free_model_hooks(self):
            seen.append(float(draw()))

    parts = tiny.pipeline("sd").components
    arguments = {**tiny.arguments("sd", 2), "output_type": "latent"}
    for own, who in ((Early, "Early, before its first denoising step"), (Late, "Late")):
        seen: list[float] = []
        pipe = own(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        before = _states()
        both = dr.Reader(pipe).run(PROMPTS, seeds=[4, 7], **arguments)
        alone = dr.Reader(pipe).run(PROMPTS[1], seeds=7, **arguments)
        assert who in both.firing.notes[0]
        assert _states() == before
        assert torch.equal(both.images[1:], alone.images)
        if seen:
            assert seen[-1] == seen[-2] != seen[-3]  # row 1 in both runs, row 0


def test_processors_of_perturbed_attention_are_put_back() -> None:
    parts = tiny.pipeline("sd").components
    pipe = diffusers.StableDiffusionPAGPipeline(
        **parts, pag_applied_layers="mid", requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.train()
    for each in pipe.unet.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.1
    before = pipe.unet.attn_processors
    arguments = {**tiny.arguments("sd", 2), "pag_scale": 2.0, "output_type": "latent"}
    found = dr.Reader(pipe).run(PROMPTS, seeds=[4, 7], **arguments)
    assert "train mode" in found.firing.notes[0]
    assert pipe.unet.attn_processors == before
