"""What each family of solvers does with the entries of its `timesteps`: steps and noise levels."""

import math
from typing import Any

import torch


def place(scheduler: Any, entry: int, start: int = 0) -> tuple[int, int]:
    """(step, evaluation within it) at an entry of `timesteps` in a run that began at `start`.

    step = start // order + (entry - start) // order, evaluation = (entry - start) % order: a solver
    begins anew where its run begins, and keeps the numbering of its full trajectory. PNDM calls
    itself a scheduler of order 1 but takes several evaluations for its first steps: two for the
    first one when the Runge-Kutta start is skipped (its `timesteps` repeat a value for that), else
    four for each of the first three.
    """
    order = int(getattr(scheduler, "order", 1))
    done = entry - start
    if not hasattr(scheduler, "plms_timesteps"):
        step, evaluation = divmod(done, order)
    elif done < (runge_kutta := len(scheduler.prk_timesteps)):
        step, evaluation = divmod(done, 4)
    elif runge_kutta:
        step, evaluation = runge_kutta // 4 + done - runge_kutta, 0
    else:
        step, evaluation = (0, done) if done < 2 else (done - 1, 0)
    return start // order + step, evaluation


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
            shift = 1 if "Ancestral" in type(scheduler).__name__ else 0
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
