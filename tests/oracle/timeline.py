"""Steps, evaluations and noise levels of each solver, from its definition.

A step carries the sample from one noise level to the next. One evaluation per step: DDIM, DDPM,
Euler, Euler ancestral, DPM++ 2M, UniPC, LCM (multistep solvers reuse old evaluations). Two per
step:

- Heun: at the level where the step starts and at the level where it ends; the mean slope is
  taken. The last step ends at zero noise, where a model cannot be evaluated, so it has one
  evaluation.
- KDPM2: where the step starts and at the geometric middle of the two levels. The last step has one.
- Ancestral KDPM2: the same, but the step aims at a lower level (next squared over here) and then
  adds noise; the geometric middle of here and there is the level where the next step starts.
- PNDM as StableDiffusion uses it (no Runge-Kutta start): its multistep formula needs one older
  slope, so the first step, and only the first, is a Heun step: evaluated where it starts and
  where it ends. With its Runge-Kutta start (not StableDiffusion's), the first three steps have four
  evaluations each.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .trace import Call

TWO_EVALUATIONS = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)


def place(scheduler: Any, index: int) -> tuple[int, int]:
    """(step, evaluation) of the `index`-th time that the loop goes round."""
    solver = type(scheduler).__name__
    if solver in TWO_EVALUATIONS:
        return index // 2, index % 2
    if solver == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        return divmod(index, 4) if index < 12 else (index - 9, 0)
    if solver == "PNDMScheduler":
        return (0, index) if index < 2 else (index - 1, 0)
    return index, 0


def levels(scheduler: Any) -> list[float]:
    """Sigma of each timestep: share of noise (flow), sqrt((1 - a) / a) (diffusion)."""
    config = scheduler.config
    times = [float(time) for time in scheduler.timesteps]
    if "FlowMatch" in type(scheduler).__name__:
        return [time / config.num_train_timesteps for time in times]
    if config.get("use_flow_sigmas"):
        # evenly spaced, moved towards noise; the timesteps are whole numbers below these levels
        share = np.linspace(1, 1 / config.num_train_timesteps, len(times) + 1)
        if type(scheduler).__name__ == "DPMSolverMultistepScheduler":
            share = 1 - share[::-1]  # from 0.999 to 0, where UniPC goes from 1 to 0.001
        moved = config.flow_shift * share / (1 + (config.flow_shift - 1) * share)
        return moved[:-1].tolist()
    kept = np.cumprod(1 - _betas(config))
    table = np.sqrt((1 - kept) / kept)
    if config.get("use_karras_sigmas"):
        # evenly spaced in the seventh root; the timesteps are rounded
        count = (len(times) + 1) // 2 if type(scheduler).__name__ in TWO_EVALUATIONS else len(times)
        ends = table[[-1, 0]] ** (1 / 7)
        found = np.linspace(*ends, count) ** 7
        return [
            found[(index + 1) // 2] if count < len(times) else found[index]
            for index in range(len(times))
        ]
    return [float(np.interp(time, np.arange(len(table)), table)) for time in times]


def _betas(config: Any) -> np.ndarray:
    low, high, count = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "scaled_linear":
        return np.linspace(low**0.5, high**0.5, count) ** 2
    assert config.beta_schedule == "linear", config.beta_schedule
    return np.linspace(low, high, count)


def walk(scheduler: Any, begin: int = 0) -> Iterator[tuple[Any, Call]]:
    """(the scheduler's timestep, what the denoiser call is) for each turn of the loop.

    A run that starts on the way (img2img) leaves out `begin` timesteps; the others keep the numbers
    that they have in the full trajectory.
    """
    solver = type(scheduler).__name__
    last, _ = place(scheduler, len(scheduler.timesteps) - 1)
    sigmas = levels(scheduler)
    for index, time in enumerate(scheduler.timesteps):
        if index < begin:
            continue
        step, evaluation = place(scheduler, index)
        sigma = sigmas[index]
        if solver == "KDPM2DiscreteScheduler" and evaluation == 1:
            sigma = (sigmas[index - 1] * sigmas[index + 1]) ** 0.5
        if solver == "KDPM2AncestralDiscreteScheduler" and evaluation == 1:
            sigma = sigmas[index + 1]
        yield time, Call(step, float(time), sigma, step / (last + 1), evaluation)
