"""What each family of solvers does with the entries of its `timesteps`: steps and noise levels."""

import math
from typing import Any

import torch

from dreamreader.engine._families.classes import entry_of


def place(scheduler: Any, entry: int) -> tuple[int, int]:
    """(step, evaluation within it) of an entry of `timesteps`, in the full trajectory.

    step = entry // order, evaluation = entry % order. PNDM calls itself a scheduler of order 1 but
    takes several evaluations for its first steps: two for the first one when the Runge-Kutta start
    is skipped (its `timesteps` repeat a value for that), else four for each of the first three. A
    run that begins on the way keeps this numbering, although PNDM then starts its formula anew.
    """
    if not hasattr(scheduler, "plms_timesteps"):
        return divmod(entry, int(getattr(scheduler, "order", 1)))
    runge_kutta = len(scheduler.prk_timesteps)
    if entry < runge_kutta:
        return divmod(entry, 4)
    if runge_kutta:
        return runge_kutta // 4 + entry - runge_kutta, 0
    return (0, entry) if entry < 2 else (entry - 1, 0)


def begins_within_step(scheduler: Any, entry: int) -> bool:
    """Whether a run that begins at this entry would take it for another evaluation than it is.

    Solvers of second order begin every run with a first evaluation. PNDM has no such pairs.
    """
    return not hasattr(scheduler, "plms_timesteps") and place(scheduler, entry)[1] != 0


def spare_entries(scheduler: Any) -> int:
    """Entries at the end of `timesteps` at which no denoiser is called: they only end a step."""
    return entry_of(type(scheduler), _SPARE, "set_timesteps") or 0


_SPARE = {"DDPMWuerstchenScheduler": 1, "SCMScheduler": 1}

Levels = tuple[list[float | None], list[float | None]]


def noise_levels(scheduler: Any, timesteps: list[float]) -> Levels | None:
    """Sigma of every entry of `timesteps`, as a first and as a later evaluation of its step.

    Schedulers with a `sigmas` table give sigma_i = sigmas[i], in their own units (flow matching: 0
    to 1). Schedulers with `alphas_cumprod` and whole timesteps give sigma = sqrt((1 - abar) /
    abar), abar at the timestep; infinite at zero terminal signal. KDPM2 evaluates the second half
    of a step between two levels and keeps those in `sigmas_interpol`; DPMSolverSDE draws them while
    it runs (None here, see `live_level`). A scheduler that has neither table gives None.
    """
    count = len(timesteps)
    table = getattr(scheduler, "sigmas", None)
    if table is not None and len(table) >= count:
        first: list[float | None] = [*_host(table)[:count]]
        between = getattr(scheduler, "sigmas_interpol", None)
        if between is not None:
            # the ancestral variant indexes this table one entry lower (see its scale_model_input)
            lower = {"KDPM2AncestralDiscreteScheduler": 1}
            shift = entry_of(type(scheduler), lower, "scale_model_input") or 0
            inner = _host(between)
            return first, [inner[max(index - shift, 0)] for index in range(count)]
        return first, [None] * count if hasattr(scheduler, "mid_point_sigma") else first
    signal = getattr(scheduler, "alphas_cumprod", None)
    if signal is not None and all(
        float(t).is_integer() and 0 <= t < len(signal) for t in timesteps
    ):
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
