"""What each family of solvers does with the entries of its `timesteps`: steps and noise levels."""

import math
from typing import Any

import torch


def place(scheduler: Any, entry: int) -> tuple[int, int]:
    """(step, evaluation within it) of the `entry`-th turn of a run, by the scheduler's `order`.

    PNDM calls itself a scheduler of order 1 but takes several evaluations for its first steps: two for
    the first one when the Runge-Kutta start is skipped (its `timesteps` repeat a value for that), else
    four for each of the first three.
    """
    if hasattr(scheduler, "plms_timesteps"):
        start = len(scheduler.prk_timesteps)
        if entry < start:
            return divmod(entry, 4)
        if start:
            return start // 4 + entry - start, 0
        return (0, entry) if entry < 2 else (entry - 1, 0)
    return divmod(entry, int(getattr(scheduler, "order", 1)))


def skipped_steps(scheduler: Any, timesteps: list[float], start: int) -> int:
    """Steps of the full trajectory before entry `start`: those that img2img leaves out."""
    if hasattr(scheduler, "plms_timesteps"):
        # the repeated value belongs to one step
        return len(set(timesteps[:start]) - {timesteps[start]})
    return place(scheduler, start)[0]


Levels = tuple[list[float | None], list[float | None]]


def noise_levels(scheduler: Any, timesteps: list[float]) -> Levels | None:
    """Sigma of every entry of `timesteps`, as a first and as a later evaluation of its step.

    Schedulers with a `sigmas` table give sigma_i = sigmas[i], in their own units (flow matching: 0 to 1).
    Schedulers with `alphas_cumprod` and whole timesteps give sigma = sqrt((1 - abar) / abar), abar at the
    timestep; infinite at zero terminal signal. KDPM2 evaluates the second half of a step between two
    levels and keeps those in `sigmas_interpol`; DPMSolverSDE draws them while it runs (None here, see
    `live_level`). A scheduler that has neither table gives None.
    """
    count = len(timesteps)
    table = getattr(scheduler, "sigmas", None)
    if table is not None and len(table) >= count:
        first: list[float | None] = [*_host(table)[:count]]
        between = getattr(scheduler, "sigmas_interpol", None)
        if between is not None:
            # the ancestral variant indexes this table one entry lower (see its scale_model_input)
            shift = 1 if "Ancestral" in type(scheduler).__name__ else 0
            inner = _host(between)
            return first, [inner[max(index - shift, 0)] for index in range(count)]
        return first, [None] * count if hasattr(scheduler, "mid_point_sigma") else first
    signal = getattr(scheduler, "alphas_cumprod", None)
    if signal is not None and all(float(t).is_integer() and 0 <= t < len(signal) for t in timesteps):
        kept = _host(signal)
        levels: list[float | None] = [_ratio(kept[int(t)]) for t in timesteps]
        return levels, levels
    return None


def live_level(scheduler: Any) -> float | None:
    """The level that DPMSolverSDE drew for the second evaluation of the running step."""
    level = getattr(scheduler, "mid_point_sigma", None)
    return None if level is None else float(level)


def _ratio(abar: float) -> float:
    return math.sqrt((1.0 - abar) / abar) if abar > 0 else math.inf


def _host(values: Any) -> list[float]:
    return torch.as_tensor(values).detach().to("cpu", torch.float64).tolist()
