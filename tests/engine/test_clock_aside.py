"""What a callback of the run calls is not the run: another pipeline, the denoiser, the VAE."""

import threading

import diffusers
import pytest
import torch

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._clock import Clock
from dreamreader.engine._subject import Subject
from dreamreader.engine._tracker import PipelineTracker
from dreamreader.errors import ClockUnknown

from .. import tiny
from .clock_log import Log, call


def two(scheduler: str = "DDIMScheduler", shared: bool = False):
    """A pipeline, and an image-to-image one with the same UNet and the same schedule."""
    pipe = tiny.pipeline("sd")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    if not shared:
        other.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return pipe, other


def preview_by(other, **kwargs):
    """A callback in which `other` draws."""

    def preview(pipe, turn, time, tensors):
        if turn == 1:
            picture = torch.full((1, 3, 16, 24), 0.5)
            other("a star", image=picture, strength=0.6, output_type="latent", **kwargs)
        return tensors

    return preview


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_another_pipeline_with_the_same_unet(scheduler: str) -> None:
    pipe, other = two(scheduler)
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe, callback_on_step_end=preview_by(other, num_inference_steps=4))
        assert [each.step for each in clock.schedule] == [0, 1, 2, 3]
    own = [n for n, each in enumerate(log.said) if not isinstance(each, ClockUnknown)]
    assert own == [0, 1, 4, 5]  # two calls of the other one in between
    assert [log.said[n].step for n in own] == [0, 1, 2, 3]
    for n in (2, 3):
        assert "unet has no step or branch: it is called in a callback" in str(log.said[n])


def test_the_denoiser_itself() -> None:
    pipe, _ = two()
    text = torch.zeros(2, 4, pipe.unet.config.cross_attention_dim)

    def look(pipe, turn, time, tensors):
        pipe.unet(torch.zeros(2, 4, 8, 12), time, text)
        return tensors

    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe, callback_on_step_end=look)
        with pytest.raises(ClockUnknown, match="no denoiser"):
            clock.now()
    assert [isinstance(each, ClockUnknown) for each in log.said] == [False, True] * 4


def test_the_same_pipeline_once_more() -> None:
    pipe, _ = two()
    inner = []

    def again(pipe, turn, time, tensors):
        if turn == 1:
            inner.append(True)
            call("sd", pipe, "a star", num_inference_steps=4)
        return tensors

    with PipelineTracker(Subject(pipe)) as tracker, Log(tracker.clock) as log:
        call("sd", pipe, callback_on_step_end=again)
        assert tracker.runs == 1 and tracker.prompts == ["a red cat"]
    assert inner and [isinstance(e, ClockUnknown) for e in log.said] == (
        [False] * 2 + [True] * 4 + [False] * 2
    )


def test_a_scheduler_that_both_share() -> None:
    """Another number of steps leaves no schedule to go on with; the same one does."""
    pipe, other = two(shared=True)
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe, callback_on_step_end=preview_by(other, num_inference_steps=5))
    assert "was set anew in a callback" in str(log.said[-1])
    assert "was set anew in a callback" in str(log.said[-2])
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe, callback_on_step_end=preview_by(other, num_inference_steps=4))
    steps = [each.step for each in log.said if not isinstance(each, ClockUnknown)]
    assert steps == [0, 1, 2, 3]


def test_what_the_tracker_says_of_them() -> None:
    pipe, other = two()
    said: list[CallContext] = []

    def decode(pipe, turn, time, tensors):
        if turn == 0:
            said.append(tracker.outside("vae"))
        return preview(pipe, turn, time, tensors)

    preview = preview_by(other, num_inference_steps=4)
    with PipelineTracker(Subject(pipe)) as tracker:
        hooks = [
            part.register_forward_hook(lambda *_: said.append(tracker.now))
            for part in (pipe.text_encoder, pipe.unet)
        ]
        call("sd", pipe, callback_on_step_end=decode)
        for hook in hooks:
            hook.remove()
    phases = [(now.component, now.phase) for now in said]
    unet, text = ("unet", "denoise"), ("text_encoder", "text")
    theirs = [("text_encoder", "aside")] * 2 + [("unet", "aside")] * 2
    assert phases == [text] * 2 + [unet, ("vae", "aside"), unet, *theirs, unet, unet]
    for now in said:
        if now.phase == "aside":
            assert "in a callback of the running pipeline" in str(now.instant)
            assert isinstance(now.branches, ClockUnknown)


@pytest.mark.parametrize("way", ["positional", "object", "old"])
def test_every_form_of_callback(way: str) -> None:
    pipe, other = two()
    preview = preview_by(other, num_inference_steps=4)

    class Callback(diffusers.callbacks.PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipe, turn, time, tensors):
            return preview(pipe, turn, time, tensors)

    with Clock(pipe) as clock, Log(clock) as log:
        if way == "object":
            call(
                "sd",
                pipe,
                callback_on_step_end=Callback(cutoff_step_index=0, cutoff_step_ratio=None),
            )
        elif way == "old":
            with pytest.warns(FutureWarning, match="callback"):
                given = {"callback": lambda turn, time, _: preview(0, turn, time, {})}
                call("sd", pipe, callback_steps=1, **given)
        else:
            names = "height width num_inference_steps timesteps sigmas guidance_scale".split()
            names += "negative_prompt num_images_per_prompt eta generator latents".split()
            names += "prompt_embeds negative_prompt_embeds ip_adapter_image".split()
            names += "ip_adapter_image_embeds output_type return_dict".split()
            names += "cross_attention_kwargs guidance_rescale clip_skip".split()
            given = {"height": 16, "width": 24, "num_inference_steps": 4, "guidance_scale": 5.0}
            given |= {"num_images_per_prompt": 1, "eta": 0.0, "output_type": "latent"}
            given |= {"return_dict": True, "guidance_rescale": 0.0}
            pipe("a red cat", *(given.get(name) for name in names), preview)
    assert [isinstance(e, ClockUnknown) for e in log.said] == [False] * 2 + [True] * 2 + [False] * 2


def test_a_callback_that_fails_leaves_no_mark() -> None:
    pipe, _ = two()

    def fail(*_):
        raise RuntimeError("in the callback")

    with Clock(pipe) as clock, Log(clock) as log:
        with pytest.raises(RuntimeError, match="in the callback"):
            call("sd", pipe, callback_on_step_end=fail)
        call("sd", pipe)
    assert [moment.step for moment in log.moments] == [0, 0, 1, 2, 3]


def test_another_thread_does_not_take_part() -> None:
    """The run's own call is still the running one while another thread calls the denoiser."""
    pipe, _ = two()
    steps, text = [], torch.zeros(2, 4, pipe.unet.config.cross_attention_dim)
    inside = []

    def elsewhere(module, args):
        if not inside:
            inside.append(True)
            thread = threading.Thread(target=lambda: pipe.unet(torch.zeros(2, 4, 8, 12), 500, text))
            thread.start()
            thread.join()
            steps.append(clock.now().step)
            inside.clear()

    with Clock(pipe) as clock:
        hook = pipe.unet.conv_in.register_forward_pre_hook(elsewhere)
        call("sd", pipe)
        hook.remove()
    assert steps == [0, 1, 2, 3]
