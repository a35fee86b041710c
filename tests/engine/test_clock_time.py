"""Step, timestep, sigma, fraction and evaluation, against facts worked out by hand."""

import math

import diffusers
import pytest
import torch

from dreamreader.engine._clock import Clock, DenoiserCall
from dreamreader.engine._clock_schedule import Trajectory
from dreamreader.engine._families.timestep import invert, raw, thousandth
from dreamreader.errors import ClockUnknown

from .. import tiny
from ..tiny.parts import assemble
from .clock_log import Log, call, logged


def with_scheduler(name: str, scheduler: str, **config: object):
    pipe = tiny.pipeline(name)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    return pipe


def places(said) -> list[tuple[int, int]]:
    return [(moment.step, moment.evaluation) for moment in said]


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
    + ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"],
)
def test_first_order_solvers_take_one_call_per_step(scheduler: str) -> None:
    pipe = with_scheduler("sd", scheduler)
    said = logged("sd", pipe, num_inference_steps=5)
    assert places(said) == [(step, 0) for step in range(5)]
    assert [moment.timestep for moment in said] == pipe.scheduler.timesteps.tolist()
    assert [moment.fraction for moment in said] == [0.0, 0.2, 0.4, 0.6, 0.8]
    sigmas = [moment.sigma for moment in said]
    assert sigmas == sorted(sigmas, reverse=True)


def test_ddim_noise_level_is_that_of_its_timestep() -> None:
    pipe = with_scheduler("sd", "DDIMScheduler")
    for moment in logged("sd", pipe):
        kept = pipe.scheduler.alphas_cumprod[int(moment.timestep)].item()
        assert moment.sigma == pytest.approx(math.sqrt((1 - kept) / kept), rel=1e-6)


def test_heun_evaluations_share_their_step_although_values_repeat() -> None:
    pipe = with_scheduler("sd", "HeunDiscreteScheduler")
    said = logged("sd", pipe)
    assert places(said) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    times = [moment.timestep for moment in said]
    assert times[1] == times[2] and times[3] == times[4], "the values that repeat"
    assert [moment.fraction for moment in said] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75]
    assert said[1].sigma == said[2].sigma < said[0].sigma


@pytest.mark.parametrize(
    "scheduler",
    ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "HeunDiscreteScheduler"],
)
def test_sigma_is_the_level_the_scheduler_scales_the_input_by(scheduler: str) -> None:
    pipe = with_scheduler("sd", scheduler)
    scale, scales = pipe.scheduler.scale_model_input, []

    def listening(sample, timestep):
        out = scale(sample, timestep)
        scales.append((sample.norm() / out.norm()).item())
        return out

    pipe.scheduler.scale_model_input = listening
    said = logged("sd", pipe)
    assert places(said)[:4] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [math.sqrt(m.sigma**2 + 1) for m in said] == pytest.approx(scales, rel=1e-5)


def test_pndm_repeats_a_value_within_its_first_step() -> None:
    pipe = with_scheduler("sd", "PNDMScheduler", skip_prk_steps=True)
    said = logged("sd", pipe)
    assert [m.timestep for m in said] == pipe.scheduler.timesteps.tolist()
    assert said[1].timestep == said[2].timestep
    assert places(said) == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]


def test_pndm_with_its_runge_kutta_start() -> None:
    pipe = with_scheduler("sd", "PNDMScheduler", skip_prk_steps=False)
    said = logged("sd", pipe, num_inference_steps=5)
    start = [(step, evaluation) for step in range(3) for evaluation in range(4)]
    assert places(said) == [*start, (3, 0), (4, 0)]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("DDIMScheduler", [(2, 0), (3, 0), (4, 0)]),
        ("EulerDiscreteScheduler", [(2, 0), (3, 0), (4, 0)]),
        ("HeunDiscreteScheduler", [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]),
        ("KDPM2DiscreteScheduler", [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]),
    ],
)
def test_img2img_begins_on_the_way(scheduler: str, expected: list[tuple[int, int]]) -> None:
    pipe = with_scheduler("sd-img2img", scheduler)
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd-img2img", pipe, num_inference_steps=5, strength=0.6)
        assert [instant.step for instant in clock.schedule] == [2, 3, 4]
    assert places(log.said) == expected
    assert log.moments[0].fraction == 0.4


def test_flux_img2img_begins_on_the_way() -> None:
    said = logged("flux-img2img", tiny.pipeline("flux-img2img"), num_inference_steps=5)
    assert places(said) == [(2, 0), (3, 0), (4, 0)]


@pytest.mark.parametrize("name", ["sd3", "flux", "aura-flow", "lumina2", "sana", "qwen-image"])
def test_timestep_is_the_schedulers_whatever_the_denoiser_receives(name: str) -> None:
    pipe = tiny.pipeline(name)
    said = logged(name, pipe, guidance_scale=1.0)
    said = [moment for moment in said if "cond" in moment.branches]
    assert [m.timestep for m in said] == pipe.scheduler.timesteps.tolist()[: len(said)]
    assert [m.sigma for m in said] == pytest.approx(pipe.scheduler.sigmas.tolist()[: len(said)])


@pytest.mark.parametrize("name", ["flux", "aura-flow", "sd3", "pixart-sigma"])
def test_rounding_of_the_timestep_to_bfloat16_is_no_contradiction(name: str) -> None:
    pipe = tiny.pipeline(name).to(torch.bfloat16)
    with Clock(pipe) as clock, Log(clock) as log:
        call(name, pipe, num_inference_steps=7)
    assert [moment.step for moment in log.moments] == list(range(7))


def test_one_object_used_twice_starts_anew() -> None:
    pipe = with_scheduler("sd", "EulerDiscreteScheduler")
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe, num_inference_steps=3)
        call("sd", pipe, num_inference_steps=2)
    assert [moment.step for moment in log.moments] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "PNDMScheduler", "DDIMScheduler"])
def test_a_run_after_one_that_failed_starts_anew(scheduler: str) -> None:
    pipe = with_scheduler("sd", scheduler)

    def fail(pipe, turn, time, tensors):
        if turn == 1:
            raise RuntimeError("stop here")
        return tensors

    with Clock(pipe) as clock, Log(clock) as log:
        with pytest.raises(RuntimeError, match="stop here"):
            call("sd", pipe, callback_on_step_end=fail)
        with pytest.raises(ClockUnknown, match="no denoiser"):
            clock.now()
        failed = len(log.said)
        call("sd", pipe, num_inference_steps=5)
    assert failed == 2
    assert [moment.timestep for moment in log.moments[failed:]] == pipe.scheduler.timesteps.tolist()
    assert log.moments[failed].step == 0


def test_a_call_that_fails_is_over() -> None:
    pipe = with_scheduler("sd", "DDIMScheduler")
    with Clock(pipe) as clock:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            pipe.unet(torch.zeros(1, 4, 8, 12), 500, torch.zeros(1, 4, 3))  # text of another width
        with pytest.raises(ClockUnknown, match="no denoiser"):
            clock.now()


def test_a_denoiser_called_directly_has_no_time() -> None:
    pipe = with_scheduler("sd", "DDIMScheduler")
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe)
        text = torch.zeros(1, 4, pipe.unet.config.cross_attention_dim)
        # a timestep of the finished run: its schedule still stands in the scheduler
        pipe.unet(torch.zeros(1, 4, 8, 12), pipe.scheduler.timesteps[1], text)
    assert isinstance(log.said[-1], ClockUnknown)
    assert "outside a run" in str(log.said[-1])


def test_another_scheduler_in_charge_is_noticed() -> None:
    pipe = with_scheduler("sd", "EulerDiscreteScheduler")

    def go_back(pipe, turn, time, tensors):
        pipe.scheduler._step_index = 0
        return tensors

    said = logged("sd", pipe, callback_on_step_end=go_back)
    assert isinstance(said[0], DenoiserCall)
    for error in said[1:]:
        assert isinstance(error, ClockUnknown) and "not of the same run" in str(error)


def test_nothing_is_known_before_and_after_a_run() -> None:
    clock = Clock(tiny.pipeline("sd"))
    with pytest.raises(ClockUnknown, match="only inside its with block"):
        clock.now()
    with clock:
        assert clock.schedule == []
        with pytest.raises(ClockUnknown, match=r"no denoiser of the pipeline \(unet\) is running"):
            clock.time()


def test_timesteps_set_anew_within_a_run() -> None:
    pipe = with_scheduler("sd", "EulerDiscreteScheduler")

    def refine(pipe, turn, time, tensors):
        if turn == 1:
            pipe.scheduler.set_timesteps(7)
        return tensors

    said = logged("sd", pipe, callback_on_step_end=refine)
    assert [(moment.step, moment.timestep) for moment in said[:2]] == [(0, 999), (1, 666)]
    # the pipeline still walks the timesteps it began with
    for error in said[2:]:
        assert isinstance(error, ClockUnknown) and "set anew in a callback" in str(error)


def test_scheduler_swapped_between_runs() -> None:
    pipe = with_scheduler("sd", "DDIMScheduler")
    with Clock(pipe) as clock, Log(clock) as log:
        call("sd", pipe, num_inference_steps=2)
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        call("sd", pipe, num_inference_steps=2)
    assert places(log.said) == [(0, 0), (1, 0), (0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("ar_step", [0, 1])
def test_frames_at_different_steps_have_no_single_one(ar_step: int) -> None:
    """Diffusion forcing: with `ar_step` later frames wait for the earlier ones."""
    pipe = assemble("SkyReelsV2DiffusionForcingPipeline", "skyreels")
    width = pipe.transformer.config.text_dim
    times: list[list[int]] = []
    with Clock(pipe) as clock, Log(clock) as log:
        hook = pipe.transformer.register_forward_pre_hook(
            lambda m, a, k: times.append(sorted({int(t) for t in k["timestep"].flatten()})),
            with_kwargs=True,
        )
        pipe(
            None,
            prompt_embeds=torch.ones(1, 16, width),
            negative_prompt_embeds=torch.zeros(1, 16, width),
            height=16,
            width=32,
            num_frames=9,
            base_num_frames=9,
            ar_step=ar_step,
            causal_block_size=1 if ar_step else None,
            num_inference_steps=3,
            max_sequence_length=16,
            output_type="latent",
        )
        hook.remove()
    assert any(len(each) > 1 for each in times) == bool(ar_step)
    order = sorted({each[-1] for each in times}, reverse=True)
    for found, said in zip(times, log.said, strict=True):
        if len(found) > 1:
            assert isinstance(said, ClockUnknown) and "it has no single step" in str(said)
        else:
            assert isinstance(said, DenoiserCall) and said.step == order.index(found[0])


def test_a_given_first_frame_is_no_other_step() -> None:
    pipe = assemble("LTXImageToVideoPipeline", "ltx")
    times: list[list[float]] = []
    with Clock(pipe) as clock, Log(clock) as log:
        hook = pipe.transformer.register_forward_pre_hook(
            lambda m, a, k: times.append(k["timestep"].unique().tolist()), with_kwargs=True
        )
        pipe(
            image=torch.rand(1, 3, 32, 64),
            prompt="a red cat",
            height=32,
            width=64,
            num_frames=9,
            num_inference_steps=3,
            max_sequence_length=16,
            output_type="latent",
        )
        hook.remove()
    assert [len(each) for each in times] == [2] * 3 and {each[0] for each in times} == {0.0}
    assert [m.timestep for m in log.moments] == [each[1] for each in times]
    assert [(m.step, m.branches) for m in log.moments] == [
        (n, ("uncond", "cond")) for n in range(3)
    ]


class TestTrajectory:
    """The cases that no pipeline on this machine reaches."""

    def ddim(self, steps: int = 10) -> diffusers.DDIMScheduler:
        scheduler = diffusers.DDIMScheduler()
        scheduler.set_timesteps(steps)
        return scheduler

    @pytest.mark.parametrize("form", [raw, thousandth, invert])
    def test_place_from_the_value(self, form) -> None:
        scheduler = self.ddim()
        trajectory = Trajectory(scheduler, form, None)
        for index, time in enumerate(scheduler.timesteps.tolist()):
            assert trajectory.locate(torch.tensor(form(time, 1000, None)), 1e-5) == index

    def test_one_value_per_token_counts_the_noisy_ones(self) -> None:
        """Only where the family has tokens without noise in the call of any step."""
        scheduler = self.ddim()
        tokens = torch.tensor([[0, 0, 700, 700], [0, 0, 700, 700]])
        at = scheduler.timesteps.tolist().index(700)
        assert Trajectory(scheduler, raw, None, clean_tokens=True).locate(tokens, 1e-6) == at
        with pytest.raises(ClockUnknown, match=r"different noise levels \(timesteps 0 to 700\)"):
            Trajectory(scheduler, raw, None).locate(tokens, 1e-6)

    def test_tokens_at_two_noise_levels_have_no_step(self) -> None:
        scheduler = self.ddim()
        for values in ([[700, 800]], [[0, 700, 800]], [700, 800]):
            for clean in (False, True):
                trajectory = Trajectory(scheduler, raw, None, clean)
                with pytest.raises(ClockUnknown, match="it has no single step"):
                    trajectory.locate(torch.tensor(values), 1e-6)
        trajectory = Trajectory(scheduler, raw, None)
        trajectory.postpone(torch.tensor([700, 800]), 2, 1e-6)
        with pytest.raises(ClockUnknown, match="it has no single step"):
            trajectory.settle()
        clean = Trajectory(scheduler, raw, None, clean_tokens=True)
        clean.postpone(torch.tensor([0, 700, 700]), 2, 1e-6)
        clean.settle()

    def test_a_value_between_two_entries_is_refused(self) -> None:
        with pytest.raises(
            ClockUnknown, match="timestep 750, which is not in the schedule of DDIM"
        ):
            Trajectory(self.ddim(), raw, None).locate(torch.tensor(750), 1e-6)

    def test_coarse_rounding_that_fits_two_entries_is_refused(self) -> None:
        trajectory = Trajectory(self.ddim(500), raw, None)
        with pytest.raises(ClockUnknown, match="which one is unknown"):
            trajectory.locate(torch.tensor(900.0, dtype=torch.bfloat16), 4 * 2**-7)

    def test_an_unknown_class_of_denoiser_is_not_read(self) -> None:
        with pytest.raises(ClockUnknown, match="scales its timestep is not known"):
            Trajectory(self.ddim(), None, None).locate(torch.tensor(0.7), 1e-6)

    def test_after_the_last_step(self) -> None:
        scheduler = diffusers.EulerDiscreteScheduler()
        scheduler.set_timesteps(3)
        scheduler._step_index = 3
        with pytest.raises(ClockUnknown, match="stands at entry 3, but its schedule has 3"):
            Trajectory(scheduler, raw, None).locate(scheduler.timesteps[2], 1e-6)

    def test_no_timestep_and_no_step_index(self) -> None:
        with pytest.raises(ClockUnknown, match="keeps no step index"):
            Trajectory(self.ddim(), raw, None).locate(None, 1e-6)

    def test_a_view_of_the_schedule_is_placed_without_reading_it(self) -> None:
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
        scheduler.set_timesteps(6)
        trajectory = Trajectory(scheduler, raw, None)
        second = scheduler.timesteps[2]  # the repeated value, second time
        assert trajectory.locate(second, 1e-6) == 2
        assert Trajectory(scheduler, raw, None).locate(second[None].expand(4), 1e-6) == 2
        with pytest.raises(ClockUnknown, match=r"entries \[1, 2\]"):
            Trajectory(scheduler, raw, None).locate(second.clone(), 1e-6)

    def test_the_counter_tells_repeated_values_apart(self) -> None:
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
        scheduler.set_timesteps(6)
        trajectory = Trajectory(scheduler, raw, None)
        for index, time in enumerate(scheduler.timesteps.tolist()):
            scheduler.counter = index
            assert trajectory.locate(torch.tensor(time), 1e-6) == index

    def test_the_begin_index_tells_repeated_values_apart(self) -> None:
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)
        trajectory = Trajectory(scheduler, thousandth, None)
        repeated = scheduler.timesteps[1] / 1000
        assert scheduler.timesteps[1] == scheduler.timesteps[2]
        assert trajectory.locate(repeated, 1e-5) == 2

    def test_postponed_comparison_still_contradicts(self) -> None:
        scheduler = self.ddim()
        trajectory = Trajectory(scheduler, raw, None)
        trajectory.postpone(torch.tensor([700, 700]), 2, 1e-6)
        trajectory.settle()
        trajectory.postpone(torch.tensor([700, 700]), 3, 1e-6)
        with pytest.raises(ClockUnknown, match="not of the same run"):
            trajectory.settle()
        trajectory.settle()  # told once

    @pytest.mark.parametrize("back", [1, 2])
    def test_a_scheduler_that_goes_back_behind_the_start_of_the_run(self, back: int) -> None:
        scheduler = diffusers.EulerDiscreteScheduler()
        scheduler.set_timesteps(5)
        trajectory = Trajectory(scheduler, raw, None)
        scheduler._step_index = 3
        assert trajectory.locate(scheduler.timesteps[3], 1e-6) == 3
        scheduler._step_index = 3 - back
        text = f"went back to entry {3 - back}; the run began at entry 3"
        with pytest.raises(ClockUnknown, match=text):
            trajectory.locate(scheduler.timesteps[3 - back], 1e-6)

    def test_a_run_that_begins_at_a_repeated_timestep_begins_where_its_scheduler_does(self) -> None:
        scheduler = diffusers.EulerDiscreteScheduler()
        scheduler.set_timesteps(4)
        scheduler.timesteps[1] = scheduler.timesteps[0]
        begins = scheduler.index_for_timestep(scheduler.timesteps[0])
        assert begins == 1  # the second of the two, by its own rule
        for first in (scheduler.timesteps[0], scheduler.timesteps[0].clone()):
            assert Trajectory(scheduler, raw, None).locate(first, 1e-6) == begins
