"""A run that begins on the way has the numbers of the full trajectory, with every scheduler."""

import diffusers
import pytest
import torch

from dreamreader.engine._clock import Clock, DenoiserCall
from dreamreader.engine._clock_schedule import Trajectory
from dreamreader.engine._families.timestep import raw
from dreamreader.errors import ClockUnknown

from .. import tiny
from .clock_log import Log, call

DIFFUSION = (
    "DDIM DDPM DEISMultistep DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE EulerDiscrete "
    "EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete LCM "
    "LMSDiscrete PNDM SASolver TCD UniPCMultistep"
).split()
FLOW = ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"]


def quick(name: str, scheduler: str, **config: object):
    """A pipeline whose denoiser predicts nothing, so that only the schedule is left of a run."""
    pipe = tiny.pipeline(name)
    own = getattr(diffusers, f"{scheduler}Scheduler")
    pipe.scheduler = own.from_config(pipe.scheduler.config, **config)
    for denoiser in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        if denoiser is not None:
            denoiser.forward = lambda *args, **kwargs: (
                torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
            )
    return pipe


def moments(name: str, pipe, **kwargs) -> list[DenoiserCall]:
    with Clock(pipe) as clock, Log(clock) as log:
        call(name, pipe, **kwargs)
    return log.moments


def numbers(said: list[DenoiserCall]) -> list[tuple]:
    return [(each.step, each.evaluation, each.fraction, each.timestep) for each in said]


@pytest.mark.parametrize("scheduler", DIFFUSION)
@pytest.mark.parametrize("strength", [0.3, 0.65])
@pytest.mark.filterwarnings("ignore")  # 2026-11: schedulers warn of their own settings
def test_image_to_image_has_the_numbers_of_text_to_image(scheduler: str, strength: float) -> None:
    if scheduler == "DPMSolverSDE":
        pytest.importorskip("torchsde")
    if scheduler == "LMSDiscrete":
        pytest.importorskip("scipy")
    config = {"skip_prk_steps": True} if scheduler == "PNDM" else {}
    whole = moments("sd", quick("sd", scheduler, **config), num_inference_steps=7)
    pipe = quick("sd-img2img", scheduler, **config)
    part = moments("sd-img2img", pipe, num_inference_steps=7, strength=strength)
    assert 0 < len(part) < len(whole)
    assert numbers(part) == numbers(whole)[-len(part) :]


@pytest.mark.parametrize("scheduler", FLOW)
@pytest.mark.filterwarnings("ignore")
def test_flow_matching(scheduler: str) -> None:
    whole = moments("sd3", quick("sd3", scheduler), num_inference_steps=7)
    other = quick("sd3", scheduler)
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**other.components)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.full((1, 3, 16, 24), 0.5)
    part = moments("sd3", pipe, num_inference_steps=7, strength=0.5, image=picture)
    assert 0 < len(part) < len(whole)
    assert numbers(part) == numbers(whole)[-len(part) :]


def test_pndm_keeps_the_step_of_each_timestep() -> None:
    """By hand: 7 steps of 142; 428 is the fifth of them, whatever the run began with."""
    pipe = quick("sd-img2img", "PNDM", skip_prk_steps=True, steps_offset=0)
    said = moments("sd-img2img", pipe, num_inference_steps=7, strength=0.3)
    assert [(m.timestep, m.step, m.evaluation) for m in said] == [
        (284, 4, 0),
        (142, 5, 0),
        (0, 6, 0),
    ]
    assert said[0].fraction == pytest.approx(4 / 7)


def test_a_run_that_begins_inside_a_step_of_two_evaluations() -> None:
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    with pytest.raises(ClockUnknown, match="begins at entry 3 of HeunDiscreteScheduler, inside"):
        Trajectory(scheduler, raw, None).locate(scheduler.timesteps[3], 1e-6)
