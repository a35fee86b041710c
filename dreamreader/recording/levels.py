"""What a denoiser's input is made of at a noise level, and the timestep that goes with it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import DenoiserCall, Reader
from dreamreader.engine import form_of as timestep_form
from dreamreader.errors import InvalidInput
from dreamreader.recording.calls import Calls

# Schedules end at different levels, one at pure noise and one with 0.6 % of signal; so much less or
# more of signal or noise is taken for the same.
_END = 0.01
_TIMESTEP = ("timestep", "timesteps", "t")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's latents are (1 - t) x0 + t noise."""
    config = getattr(scheduler, "config", {})
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def check_level(what: str, level: Any) -> float:
    """A ratio of noise to signal, which may be infinite, as a float.

    Args:
        what: asks for it, for the error. level: a number of Python, of NumPy, or in a tensor.

    Raises:
        InvalidInput: it is no single number from 0.
    """
    given = level
    if isinstance(level, Tensor | np.ndarray | np.generic):
        if math.prod(level.shape) != 1:
            raise InvalidInput(
                f"{what}: level is one ratio of noise to signal, got {list(level.shape)} of them"
            )
        given = level.item()
    if isinstance(given, bool) or not isinstance(given, Real) or not float(given) >= 0:
        raise InvalidInput(f"{what}: level is a ratio of noise to signal from 0, got {level!r}")
    return float(given)


def mix_weights(scheduler: Any, level: float) -> tuple[float, float]:
    """The weights of signal and noise in a denoiser's input at a noise level.

    Formula: input = s x0 + n e with n / s = level and s^2 + n^2 = 1 (variance-preserving) or
        s + n = 1 (flow matching)

    Args:
        scheduler: of the denoiser's pipeline. level: ratio of noise to signal, infinite at pure
            noise; see `noise_levels`.

    Raises:
        InvalidInput: the level is negative or NaN, or it is not known how the scheduler mixes.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
        >>> mix_weights(FlowMatchEulerDiscreteScheduler(), 3.0)
        (0.25, 0.75)
        >>> [round(each, 3) for each in mix_weights(DDIMScheduler(), 0.75)]
        [0.8, 0.6]
    """
    level = check_level("mix_weights", level)
    flow = is_flow(scheduler)
    known = hasattr(scheduler, "alphas_cumprod") or flow
    if not known or getattr(scheduler, "config", {}).get("invert_sigmas"):
        raise InvalidInput(
            f"how {type(scheduler).__name__} mixes signal and noise is not known: its latents "
            "cannot be converted"
        )
    if math.isinf(level):
        return 0.0, 1.0
    whole = 1 + level if flow else math.hypot(1, level)
    return 1 / whole, level / whole


def convert_latents(
    latents: Float[Tensor, "*latents"], level: float, source: Any, target: Any
) -> Float[Tensor, "*latents"]:
    """Scales the input of one denoiser to what another is given at the same noise level.

    Formula: s x0 + n e -> s' x0 + n' e with n' / n = s' / s, so that the ratio of signal to noise
        stays; see `mix_weights`

    Args:
        latents: as the source's denoiser gets them (which `scale_model_input` has scaled).
        level: ratio of noise to signal in them; see `noise_levels`.
        source, target: the schedulers of both.

    Returns:
        New latents; x0 and e are those of before.

    Raises:
        InvalidInput: it is not known how a scheduler mixes, or there is no such level.

    Example:
        >>> from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
        >>> x0, e = torch.randn(2, 4, 8, 8)
        >>> flow = convert_latents(
        ...     0.8 * x0 + 0.6 * e, 0.75, DDIMScheduler(), FlowMatchEulerDiscreteScheduler()
        ... )
        >>> torch.allclose(flow, x0 / 1.75 + e * 0.75 / 1.75, atol=1e-6)
        True
    """
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise InvalidInput(f"convert_latents: latents are a floating point tensor, got {kind}")
    level = check_level("convert_latents", level)
    (signal, noise), (wanted, more) = (mix_weights(each, level) for each in (source, target))
    return latents * (more / noise if level > 1 else wanted / signal)


def find_timestep(scheduler: Any, level: float) -> tuple[float, float]:
    """The scheduler's timestep at a noise level, between its integers too, and the level there.

    The level is the given one, or the end of the schedule where this is as good as the same: where
    its weights of signal and noise differ by 0.01 at most.

    Raises:
        InvalidInput: the schedule has no such level, or its mixture is not known.
    """
    _check_timesteps(scheduler)
    level = check_level("find_timestep", level)
    signal, noise = mix_weights(scheduler, level)
    train = scheduler.config.get("num_train_timesteps", 1000)
    if is_flow(scheduler):
        return noise * train, level
    kept = scheduler.alphas_cumprod.detach().cpu().double().clamp(0, 1)
    table = ((1 - kept) / kept).sqrt().numpy()  # ascending; infinite at a last one without signal
    wanted, level = level, min(max(level, float(table[0])), float(table[-1]))
    if level != wanted:
        near = mix_weights(scheduler, level)
        if max(abs(near[0] - signal), abs(near[1] - noise)) > _END:
            raise InvalidInput(
                f"{type(scheduler).__name__} has no noise level {wanted:.4g}: its levels, times "
                f"the signal, are {table[-1]:.4g} to {table[0]:.4g}"
            )
    if math.isinf(level):
        return float(len(table) - 1), level
    finite = np.isfinite(table)
    place = np.interp(math.log(level), np.log(table[finite]), np.arange(finite.sum()))
    return float(place), level


def _check_timesteps(scheduler: Any) -> None:
    """Refuse schedulers that tell their denoiser no place among the steps of the training."""
    kind = getattr(scheduler, "config", {}).get("timestep_type", "discrete")
    if kind != "discrete":
        raise InvalidInput(
            f"{type(scheduler).__name__} tells its denoiser {kind} timesteps, which are known at "
            "the levels of its own runs alone; choose schedule='equal' or 'noise'"
        )


def split_levels(
    scheduler: Any, levels: Sequence[float]
) -> tuple[list[tuple[int, float, float]], list[float]]:
    """Of levels those that a schedule has, as (number, timestep, level), and the others."""
    _check_timesteps(scheduler)
    there, beyond = [], []
    for number, level in enumerate(levels):
        mix_weights(scheduler, level)  # what is not known at any level is not left out
        try:
            there.append((number, *find_timestep(scheduler, level)))
        except InvalidInput:
            beyond.append(level)
    return there, beyond


def call_at_levels(
    reader: Reader,
    calls: Calls,
    moments: Sequence[DenoiserCall],
    times: Sequence[tuple[float, float]],
    latents: Float[Tensor, "rows calls *latents"],
) -> Calls:
    """Calls of a denoiser at noise levels of one's choice, with the prompts of a run.

    Args:
        reader: of the pipeline. calls: of any run of it with these prompts.
        moments: what each call is named after: its step, place and evaluation.
        times: timestep and level of each; see `find_timestep`. latents: that it sees.

    Raises:
        InvalidInput: how the denoiser is told its timestep is not known, or it is given something
            else that changes from call to call.
    """
    scheduler, denoiser = reader.subject.scheduler, calls.denoiser
    form = timestep_form(type(denoiser), type(scheduler))
    every = calls.order
    named = [path for path in every if path[-1] in _TIMESTEP]
    if form is None or len(named) != 1:
        raise InvalidInput(
            f"in which form {type(denoiser).__name__} is given its timestep is not known, so it "
            "cannot be called at other noise levels than its own; choose schedule='noise'"
        )
    others = [path for path in calls.moving if path not in (named[0], (calls.sample,))]
    if others:
        raise InvalidInput(
            f"{type(denoiser).__name__} is given {'.'.join(others[0])}, which changes from call to "
            "call, so it cannot be called at other noise levels than its own; choose "
            "schedule='noise'"
        )
    config = denoiser.config
    train = float(scheduler.config.get("num_train_timesteps", 1000))
    given = calls.moving.get(named[0], calls.still.get(named[0], calls.constant.get(named[0])))
    floating = isinstance(given, Tensor) and given.is_floating_point()
    dtype = given.dtype if floating else torch.float32  # pyright: ignore
    values = torch.tensor(
        [form(time, train, config) for time, _ in times],
        dtype=dtype,
        device=latents.device,
    )
    moved = {named[0]: values.expand(calls.rows, -1), (calls.sample,): latents}
    flow = is_flow(scheduler)
    own = [
        replace(
            each,
            timestep=time,
            sigma=mix_weights(scheduler, level)[1] if flow else level,
            branches=calls.moments[0].branches,
        )
        for each, (time, level) in zip(moments, times, strict=True)
    ]
    still = {path: value for path, value in calls.still.items() if path != named[0]}
    constant = {path: value for path, value in calls.constant.items() if path != named[0]}
    return replace(calls, moments=tuple(own), moving=moved, still=still, constant=constant)
