"""Noise levels of other schedules: denoisers called at them, on latents that are converted."""

import math
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import dreamreader
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.mapping import PairedRows
from dreamreader.recording import convert_latents, find_timestep, mix_weights, record_between

UNET, DIT = "unet.up_blocks.1", "transformer.transformer_blocks.3"
PROMPTS = ["a large red circle", "a small blue star"]


@cache
def unet() -> Reader:
    return dreamreader.load("shapes-unet")


@cache
def dit() -> Reader:
    return dreamreader.load("shapes-dit")


def settings(steps: int) -> dict[str, Any]:
    return dreamreader.zoo.settings(num_inference_steps=steps)


def kept_inputs(module: Any) -> tuple[list[Tensor], Any]:
    kept: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        kept.append(next(iter(args), kwargs.get("sample", kwargs.get("hidden_states"))).clone())

    return kept, module.register_forward_pre_hook(keep, with_kwargs=True)


def kept_outputs(module: Any) -> tuple[list[Tensor], Any]:
    kept: list[Tensor] = []

    def keep(_: Any, args: Any, out: Any) -> None:
        kept.append((out[1] if isinstance(out, tuple) else out).detach().clone())

    return kept, module.register_forward_hook(keep)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(count)]


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_latents_of_one_scheduler_become_those_of_the_other_at_the_same_noise(shift: float) -> None:
    ddim, euler = unet().subject.scheduler, diffusers.EulerDiscreteScheduler()
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    for place in (10, 500, 960):
        # by the schedulers' own ways to add noise
        ddim_latents = ddim.add_noise(x0, noise, torch.tensor([place] * 2))
        kept = float(ddim.alphas_cumprod[place])
        level = math.sqrt((1 - kept) / kept)
        t = level / (1 + level)
        flow_latents = (1 - t) * x0 + t * noise
        made = convert_latents(ddim_latents, level, ddim, flow)
        torch.testing.assert_close(made, flow_latents, rtol=1e-4, atol=1e-4)
        back = convert_latents(made, level, flow, ddim)
        torch.testing.assert_close(back, ddim_latents, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(convert_latents(back, level, ddim, euler), back)
        assert find_timestep(ddim, level) == (pytest.approx(place, abs=1e-3), level)
        assert find_timestep(flow, level)[0] == pytest.approx(1000 * t)
    assert mix_weights(ddim, math.inf) == mix_weights(flow, math.inf) == (0, 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
        diffusers.DDIMScheduler(timestep_spacing="trailing"),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(),
    ],
)
def test_timesteps_are_those_of_the_scheduler_itself(scheduler: Any) -> None:
    scheduler.set_timesteps(7)
    for timestep, sigma in zip(scheduler.timesteps.tolist(), _sigmas(scheduler), strict=False):
        found, level = find_timestep(scheduler, sigma)
        assert found == pytest.approx(timestep, abs=0.02)
        assert level == pytest.approx(sigma)


def _sigmas(scheduler: Any) -> list[float]:
    if not hasattr(scheduler, "sigmas"):
        kept = scheduler.alphas_cumprod[scheduler.timesteps].double()
        return ((1 - kept) / kept).sqrt().tolist()
    sigmas = scheduler.sigmas.double()
    flow = type(scheduler).__name__.startswith("FlowMatch")
    return (sigmas / (1 - sigmas) if flow else sigmas).tolist()


def test_levels_beyond_a_schedule_are_its_end_where_that_is_as_good_as_the_same() -> None:
    ddim = unet().subject.scheduler
    last = float(ddim.alphas_cumprod[-1])
    words = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction"
    )
    with pytest.raises(InvalidInput, match="continuous timesteps.*choose schedule='equal'"):
        find_timestep(words, 1.0)
    assert find_timestep(ddim, math.inf) == (999, pytest.approx(math.sqrt((1 - last) / last)))
    short = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012)
    with pytest.raises(InvalidInput, match="DDIMScheduler has no noise level 60: .* are 25.15 to"):
        find_timestep(short, 60.0)
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    assert find_timestep(zero, math.inf) == (999, math.inf)
    assert 900 < find_timestep(zero, 200.0)[0] < 999
    with pytest.raises(InvalidInput, match="how EDMEulerScheduler mixes signal and noise is not"):
        mix_weights(diffusers.EDMEulerScheduler(), 1.0)
    with pytest.raises(InvalidInput, match="level is a ratio of noise to signal from 0, got nan"):
        mix_weights(ddim, math.nan)


def test_a_variance_preserving_denoiser_sees_the_latents_of_a_flow_as_by_hand() -> None:
    found = record_between(
        unet(), dit(), PROMPTS, UNET, DIT, align="place", schedule="target", trajectory="target",
        progress=False, **settings(4),
    )  # fmt: skip
    assert found.times is not None and found.levels is not None
    assert found.unpaired == {"source calls": 0, "target calls": 0}
    pipe, denoiser = dit().subject, unet().subject.unet
    inputs, first = kept_inputs(pipe.transformer)
    outputs, second = kept_outputs(pipe.transformer.transformer_blocks[3])
    pipe(PROMPTS, generator=generators(2), output_type="latent", **settings(4))
    first.remove()
    second.remove()
    sigmas = pipe.scheduler.sigmas[:4].double().tolist()
    embedded = unet().subject.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    kept = unet().subject.scheduler.alphas_cumprod.double().numpy()
    table = np.log(np.sqrt((1 - kept) / kept))
    values, handle = kept_outputs(denoiser.up_blocks[1])
    for call, sigma in enumerate(sigmas):
        latents = inputs[call][2:]  # the conditional half
        if sigma == 1:
            time, latents_vp = 999.0, latents
        else:
            level = sigma / (1 - sigma)
            alpha = 1 / math.sqrt(1 + level**2)
            latents_vp = latents * alpha / (1 - sigma)
            time = float(np.interp(math.log(level), table, np.arange(1000)))
        with torch.no_grad():
            denoiser(latents_vp, torch.tensor(time), embedded)
        wanted = values[-1].flatten(2).transpose(1, 2)
        torch.testing.assert_close(found.source[UNET][:, call], wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            found.target[DIT][:, call], outputs[call][2:], rtol=1e-3, atol=1e-3
        )
        assert found.times[0][call].timestep == pytest.approx(time, abs=1e-2)
        assert found.levels[call] == pytest.approx(sigma / (1 - sigma) if sigma < 1 else math.inf)
    handle.remove()
    rows = PairedRows.of(found, UNET, DIT)
    assert rows.levels is not None and rows.levels[:4].tolist() == pytest.approx(found.levels)


def test_a_flow_is_called_at_the_levels_of_a_variance_preserving_run() -> None:
    more: dict[str, Any] = {"align": "place", "progress": False, **settings(3)}
    found = record_between(
        unet(), dit(), PROMPTS, UNET, DIT, schedule="source", trajectory="source", **more
    )
    assert found.times is not None
    for one, two in zip(*found.times, strict=True):
        assert one.sigma is not None and two.sigma == pytest.approx(one.sigma / (1 + one.sigma))
        assert two.timestep == pytest.approx(1000 * two.sigma)
    own = record_between(unet(), dit(), PROMPTS, UNET, DIT, schedule="source", **more)
    assert own.levels == pytest.approx(found.levels, rel=1e-3)
    torch.testing.assert_close(own.source[UNET], found.source[UNET])
    assert not torch.allclose(own.target[DIT], found.target[DIT], atol=0.1)  # its own pictures


def test_euler_takes_its_own_steps_at_the_levels_of_a_flow() -> None:
    pipe = diffusers.StableDiffusionPipeline(**unet().subject.components)  # pyright: ignore
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(unet().subject.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    found = record_between(
        Reader(pipe), dit(), PROMPTS[:1], UNET, DIT, align="place", schedule="target",
        progress=False, **settings(3),
    )  # fmt: skip
    assert found.times is not None and found.levels is not None
    had = [each.sigma for each in found.times[0]]
    assert had[0] == pytest.approx(157.4, abs=0.1) and math.isinf(found.levels[0])
    assert had[1] == pytest.approx(found.levels[1], rel=1e-3)
    assert had[2] == pytest.approx(0.01, rel=1e-2) and found.levels[2] < 0.005  # its end


def test_schedules_and_latents_that_cannot_be_matched_are_refused() -> None:
    asked = (unet(), dit(), PROMPTS[:1], UNET, DIT)
    more: dict[str, Any] = {"align": "place", "progress": False, **settings(2)}
    with pytest.raises(
        InvalidInput,
        match="the source cannot be run at the noise levels 157.4, 0.01, .*: its DDIMScheduler "
        "takes neither sigmas nor timesteps; choose trajectory='target'",
    ):
        record_between(*asked, schedule="target", **more)
    with pytest.raises(
        InvalidInput, match="calls both at the levels of the target.*got traj.*sour"
    ):
        record_between(*asked, schedule="target", trajectory="source", **more)
    with pytest.raises(InvalidInput, match="the source's is at|call 0 has noise .* in the source"):
        record_between(*asked, trajectory="target", **more)
    stranger = Reader(tiny.pipeline("sd"))
    with pytest.raises(InvalidInput, match="needs one autoencoder: the weights of the source's"):
        record_between(
            unet(), stranger, PROMPTS[:1], UNET, "unet.mid_block", align="mean", schedule="target",
            trajectory="target", num_inference_steps=2, height=32, width=32, progress=False,
            source_arguments={"height": 16 * 4, "width": 16 * 4},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("0.5", "got '0.5'"),
        (None, "got None"),
        (True, "got True"),
        (math.nan, "got nan"),
        (-0.5, "got -0.5"),
        ([0.5], r"got \[0.5\]"),
        (1j, "got 1j"),
        (torch.tensor(-1.0), r"got tensor\(-1.\)"),
        (torch.zeros(0), r"got \[0\] of them"),
        (torch.ones(2, 3), r"got \[2, 3\] of them"),
        (np.ones(2), r"got \[2\] of them"),
        (np.array("a"), "got array"),
    ],
    ids=str,
)
def test_levels_that_are_no_single_number_are_refused(level: Any, said: str) -> None:
    ddim, flow = unet().subject.scheduler, dit().subject.scheduler
    for name, ask in (
        ("find_timestep", lambda: find_timestep(ddim, level)),
        ("find_timestep", lambda: find_timestep(flow, level)),
        ("mix_weights", lambda: mix_weights(flow, level)),
        ("convert_latents", lambda: convert_latents(torch.ones(1, 4, 2, 2), level, ddim, flow)),
    ):
        with pytest.raises(InvalidInput, match=f"{name}: level is .*ratio of noise to.*{said}"):
            ask()


def test_levels_of_numpy_and_tensors_are_numbers() -> None:
    ddim = unet().subject.scheduler
    for level in (np.float32(0.75), torch.tensor([0.75]), np.array(0.75), np.int64(1)):
        assert find_timestep(ddim, level) == find_timestep(ddim, float(level))  # pyright: ignore


def test_latents_and_schedulers_that_are_none_are_refused() -> None:
    ddim: Any = unet().subject.scheduler
    for latents, kind in (
        (None, "NoneType"),
        (np.ones(3), "ndarray"),
        (torch.ones(3).int(), "int"),
    ):
        with pytest.raises(
            InvalidInput, match=f"latents are a floating point tensor, got .*{kind}"
        ):
            convert_latents(latents, 1.0, ddim, ddim)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="how NoneType mixes signal and noise is not known"):
        find_timestep(None, 1.0)
