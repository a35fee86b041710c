"""What runs within the run, not in a callback: another pipeline, the pipeline, the denoiser."""

from collections.abc import Callable

import diffusers
import pytest
import torch

import dreamreader as dr
from dreamreader.engine._call_context import CallContext
from dreamreader.engine._clock import Clock
from dreamreader.engine._subject import Subject
from dreamreader.engine._tracker import PipelineTracker
from dreamreader.errors import ClockUnknown

from .. import tiny
from .clock_log import Log, call

SITE = "unet.mid_block"


def two():
    """A pipeline, and another of the same class with the same UNet and a schedule of its own."""
    pipe = tiny.pipeline("sd")
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.scheduler = diffusers.DDIMScheduler.from_config(config)
    other.set_progress_bar_config(disable=True)
    return pipe, other


def once(action: Callable[[], object]) -> Callable[..., None]:
    """A hook that acts at its second call, and not within itself."""
    calls = [0]

    def hook(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 2:
            action()

    return hook


def during_the_run(pipe, where: str, action: Callable[[], object]) -> Callable[[], None]:
    """Act once in the second step: in the scheduler, or in a hook inside the denoiser."""
    hook = once(action)
    if where == "scheduler":
        step = pipe.scheduler.step

        def stepped(model_output, timestep, sample, eta=0.0, generator=None, return_dict=True):
            hook()
            return step(model_output, timestep, sample, return_dict=return_dict)

        pipe.scheduler.step = stepped
        return lambda: delattr(pipe.scheduler, "step")
    module = pipe.unet.get_submodule("down_blocks.0")
    return module.register_forward_hook(hook).remove


def running(tracker: PipelineTracker) -> CallContext:
    assert tracker.now is not None
    return tracker.now


@pytest.mark.parametrize("where", ["scheduler", "module"])
@pytest.mark.parametrize("who", ["another", "itself"])
def test_a_pipeline_within_the_run(where: str, who: str) -> None:
    pipe, other = two()
    steps = pipe.scheduler

    def draw() -> None:
        if who == "itself":
            pipe.scheduler = other.scheduler
        call("sd", pipe if who == "itself" else other, "a star", num_inference_steps=4)
        pipe.scheduler = steps

    def run() -> list[tuple[bool, torch.Tensor]]:
        inside, seen = [False], []

        def drawn() -> None:
            inside[0] = True
            draw()
            inside[0] = False

        undo = during_the_run(pipe, where, drawn)
        keep = pipe.unet.mid_block.register_forward_hook(
            lambda m, a, out: seen.append((inside[0], out.detach().clone()))
        )
        call("sd", pipe)
        keep.remove()
        undo()
        return seen

    with PipelineTracker(Subject(pipe)) as tracker, Log(tracker.clock) as log:
        run()
        assert tracker.runs == 1 and tracker.prompts == ["a red cat"] and tracker.now is None
    # the log asks when a call of the UNet ends: those in the module end before their outer one
    aside = [isinstance(each, ClockUnknown) for each in log.said]
    assert [each.step for each in log.said if not isinstance(each, ClockUnknown)] == [0, 1, 2, 3]
    assert sum(aside) == 4
    with dr.Reader(pipe).recording(SITE) as cache:
        seen = run()
    own = [value for inside, value in seen if not inside]
    assert len(seen) == 8 and [each.step for each in cache[SITE].steps] == [0, 1, 2, 3]
    for step, value in enumerate(own):
        got = cache[SITE].select(branch="cond", step=step).tensor.flatten()
        assert torch.equal(got, value[1].flatten(1).T.flatten())


def test_the_reason_names_the_other_pipeline() -> None:
    pipe, other = two()
    said: list[CallContext] = []
    undo = during_the_run(
        pipe, "scheduler", lambda: call("sd", other, "a star", num_inference_steps=4)
    )
    with PipelineTracker(Subject(pipe)) as tracker:
        hook = pipe.unet.register_forward_hook(lambda *_: said.append(running(tracker)))
        call("sd", pipe)
        hook.remove()
    undo()
    phases = [now.phase for now in said]
    assert phases == ["denoise"] * 2 + ["aside"] * 4 + ["denoise"] * 2
    assert "called by another pipeline (StableDiffusionPipeline) while" in str(said[2].instant)


def test_the_denoiser_within_its_own_call() -> None:
    pipe, _ = two()
    text = torch.zeros(2, 4, pipe.unet.config.cross_attention_dim)
    said, after = [], []

    def look() -> None:
        latents = torch.zeros(2, 4, 8, 12)
        hook = pipe.unet.register_forward_hook(lambda *_: said.append(running(tracker)))
        pipe.unet(latents, pipe.scheduler.timesteps[1], text)
        hook.remove()
        after.append((running(tracker).stamp[1], tracker.clock.now().step))

    undo = during_the_run(pipe, "module", look)
    with PipelineTracker(Subject(pipe)) as tracker:
        call("sd", pipe)
    undo()
    assert after == [((1, 0), 1)]
    assert [now.phase for now in said] == ["aside"]
    assert "it is called while a call of unet runs" in str(said[0].instant)


def test_a_run_within_another_pipeline_is_followed() -> None:
    """Only what runs within the run is not it: a run in another pipeline's callback is a run."""
    pipe, other = two()

    def draw(outer, turn, time, tensors):
        if turn == 0:
            call("sd", pipe)
        return tensors

    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", other, callback_on_step_end=draw)
    steps = [each.step for each in log.said if not isinstance(each, ClockUnknown)]
    assert steps == [0, 1, 2, 3]


class Combined(diffusers.StableDiffusionPipeline):
    """A pipeline that leaves the work to another one, which is a part of it."""

    part: diffusers.StableDiffusionPipeline

    def __call__(self, *args, **kwargs):
        return self.part(*args, **kwargs)


def test_a_pipeline_that_is_a_part_is_the_run_itself() -> None:
    part, _ = two()
    pipe = Combined(**part.components, requires_safety_checker=False)
    pipe.part = part
    with PipelineTracker(Subject(pipe)) as tracker:
        said: list[tuple[str, int]] = []

        def ask(*_: object) -> None:
            said.append((running(tracker).phase, tracker.clock.time().step))

        hook = pipe.unet.register_forward_hook(ask)
        call("sd", pipe)
        hook.remove()
    assert said == [("denoise", step) for step in range(4)]
