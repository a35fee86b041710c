"""The calls of two denoisers that belong together, and the latents that both see there."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.recording.calls import Calls, record_calls
from dreamreader.recording.levels import (
    call_at_levels,
    convert_latents,
    is_flow,
    mix_weights,
    split_levels,
)
from dreamreader.recording.schedules import LEADS, match_calls, noise_levels

TRAJECTORIES = ("own", "source", "target")
_EQUAL = 1e-3  # relative: a scheduler rounds the levels that it is given


@dataclass(frozen=True, eq=False)
class DenoiserRuns:
    """What two denoisers are run with.

    Attributes:
        readers, prompts, arguments: of source and target.
        seeds, branch, batch_size: of both.
    """

    readers: tuple[Reader, Reader]
    prompts: tuple[Sequence[str], Sequence[str]]
    arguments: tuple[Mapping[str, Any], Mapping[str, Any]]
    seeds: Sequence[int]
    branch: str
    batch_size: int

    def scheduler(self, side: int) -> Any:
        return self.readers[side].subject.scheduler

    def record(self, side: int, **changes: Any) -> Calls:
        arguments = {**self.arguments[side], **changes}
        return record_calls(
            self.readers[side],
            self.prompts[side],
            seeds=self.seeds,
            branch=self.branch,
            batch_size=self.batch_size,
            **{name: value for name, value in arguments.items() if value is not _ABSENT},
        )


@dataclass(frozen=True, eq=False)
class PairedCalls:
    """As many calls of two denoisers, with the latents that they see.

    Attributes:
        calls: of source and target. levels: ratio of noise to signal at each of the target; None
            where its scheduler does not say it.
        unpaired: how many calls of source and target have no partner.
    """

    calls: tuple[Calls, Calls]
    levels: tuple[float, ...] | None
    unpaired: tuple[int, int]


_ABSENT = object()


def pair_calls(runs: DenoiserRuns, schedule: str, trajectory: str) -> PairedCalls:
    """Runs two denoisers and pairs their calls.

    Args:
        schedule: one of `SCHEDULES`, by which calls of both runs are matched; or the side (`source`
            or `target`) at whose noise levels the other one is called.
        trajectory: whose latents are seen: each its `own`, or those of one side by both.

    Raises:
        InvalidInput: no calls belong together, latents cannot be shared, or a denoiser cannot be
            called at the levels of the other.
    """
    if schedule in LEADS:
        if trajectory not in ("own", schedule):
            raise InvalidInput(
                f"schedule={schedule!r} calls both at the levels of the {schedule}: with the "
                f"latents that it has there (trajectory={schedule!r}), or each with its own "
                f"(trajectory='own'), got trajectory={trajectory!r}"
            )
        return _follow(runs, LEADS.index(schedule), shared=trajectory != "own")
    a, b = (runs.record(side) for side in (0, 1))
    levels = None
    if schedule != "fraction":
        levels = tuple(
            noise_levels(runs.scheduler(n), each.moments) for n, each in enumerate((a, b))
        )
    matched = match_calls(a.moments, b.moments, levels, schedule)  # pyright: ignore
    calls = a.select([n for n, _ in matched]), b.select([n for _, n in matched])
    if trajectory != "own":
        if schedule != "equal":
            raise InvalidInput(
                f"latents have one noise level, and schedule={schedule!r} pairs calls of nearby "
                f"ones; choose schedule={trajectory!r}, which calls both at those of the "
                f"{trajectory}"
            )
        lead = LEADS.index(trajectory)
        check_shared(runs, calls)
        seen = _converted(runs, lead, calls[lead].latents, levels[lead])  # pyright: ignore
        calls = _with_latents(calls, 1 - lead, seen)
    left = len(a.moments) - len(matched), len(b.moments) - len(matched)
    return PairedCalls(calls, _levels_of(runs, calls[1]), left)


def _follow(runs: DenoiserRuns, lead: int, shared: bool) -> PairedCalls:
    """The calls of one run, and those of the other denoiser at its noise levels."""
    led, other = runs.record(lead), 1 - lead
    levels = noise_levels(runs.scheduler(lead), led.moments)
    there, beyond = split_levels(runs.scheduler(other), levels)
    if not there:
        raise InvalidInput(
            f"the {LEADS[other]}'s {type(runs.scheduler(other)).__name__} has none of the noise "
            f"levels of the {LEADS[lead]}: {_listed(beyond)}, times the signal"
        )
    led = led.select([number for number, _, _ in there])
    times = [(time, level) for _, time, level in there]
    if shared:
        few = {"num_inference_steps": 2, "timesteps": _ABSENT, "sigmas": _ABSENT}
        own = runs.record(other, **few)  # for what it is told of the prompts
        check_shared(runs, (led, own) if lead == 0 else (own, led))
        seen = _converted(runs, lead, led.latents, [levels[number] for number, _, _ in there])
        found = call_at_levels(runs.readers[other], own, led.moments, times, seen.to(own.latents))
    else:
        found = _run_at(runs, other, times)
    calls = (led, found) if lead == 0 else (found, led)
    left = (len(beyond), 0) if lead == 0 else (0, len(beyond))
    return PairedCalls(calls, _levels_of(runs, calls[1]), left)


def _run_at(runs: DenoiserRuns, side: int, times: Sequence[tuple[float, float]]) -> Calls:
    """A run whose scheduler takes steps at given noise levels."""
    scheduler, wanted = runs.scheduler(side), [level for _, level in times]
    asked = _schedule_arguments(scheduler, times)
    call = inspect.signature(type(runs.readers[side].subject).__call__).parameters
    problem = "takes neither sigmas nor timesteps"
    if asked is not None and next(iter(asked)) in call:
        others = {"timesteps": _ABSENT, "sigmas": _ABSENT, "num_inference_steps": _ABSENT}
        found = runs.record(side, **{**others, **asked})
        had = noise_levels(scheduler, found.moments)
        if len(had) == len(wanted) and all(map(_is_near, had, wanted)):
            return found
        problem = f"makes {_listed(had)} of them"
    raise InvalidInput(
        f"the {LEADS[side]} cannot be run at the noise levels {_listed(wanted)}, times the signal: "
        f"its {type(scheduler).__name__} {problem}; choose trajectory={LEADS[1 - side]!r}, with "
        "which it is called at them and takes no steps, or schedule='noise'"
    )


def _schedule_arguments(
    scheduler: Any, times: Sequence[tuple[float, float]]
) -> dict[str, list[Any]] | None:
    """Arguments of a pipeline with which its scheduler takes steps at some levels."""
    taken = inspect.signature(scheduler.set_timesteps).parameters
    if "sigmas" in taken and is_flow(scheduler):
        shift = float(scheduler.config.get("shift") or 1.0)
        sigmas = [mix_weights(scheduler, level)[1] for _, level in times]
        return {"sigmas": [each / (shift - (shift - 1) * each) for each in sigmas]}  # it shifts
    if "sigmas" in taken:
        return {"sigmas": [*(level for _, level in times), 0.0]}
    if "timesteps" in taken:
        return {"timesteps": [round(time) for time, _ in times]}
    return None


def _converted(runs: DenoiserRuns, lead: int, latents: Tensor, levels: Sequence[float]) -> Tensor:
    """Latents of one side as the other is given them, [rows, calls, ...]."""
    schedulers = runs.scheduler(lead), runs.scheduler(1 - lead)
    parts = [convert_latents(latents[:, n], each, *schedulers) for n, each in enumerate(levels)]
    return torch.stack(parts, 1)


def _with_latents(calls: tuple[Calls, Calls], side: int, latents: Tensor) -> tuple[Calls, Calls]:
    own = calls[side]
    changed = own.with_latents(latents.to(own.latents))
    return (changed, calls[1]) if side == 0 else (calls[0], changed)


def check_shared(runs: DenoiserRuns, calls: tuple[Calls, Calls]) -> None:
    """Refuse latents of one model that are none of the other.

    Raises:
        InvalidInput: their shapes or their autoencoders differ.
    """
    shapes = [list(each.latents.shape[2:]) for each in calls]
    if shapes[0] != shapes[1]:
        raise InvalidInput(
            f"a shared trajectory needs latents of one shape, the source's are {shapes[0]}, the "
            f"target's {shapes[1]}"
        )
    one, other = (getattr(each.subject, "vae", None) for each in runs.readers)
    if one is other:
        return
    weights = [{} if each is None else each.state_dict() for each in (one, other)]
    same = weights[0].keys() == weights[1].keys() and all(
        value.shape == weights[1][name].shape and torch.equal(value.cpu(), weights[1][name].cpu())
        for name, value in weights[0].items()
    )
    if not same:
        raise InvalidInput(
            "a shared trajectory needs one autoencoder: the weights of the source's and of the "
            "target's differ, so latents of one mean nothing to the other; choose trajectory='own'"
        )
    for name in ("scaling_factor", "shift_factor"):
        found = [getattr(each.config, name, None) for each in (one, other) if each is not None]
        if found[0] != found[1]:
            raise InvalidInput(
                f"a shared trajectory needs latents of one scale: the {name} of the source's "
                f"autoencoder is {found[0]}, that of the target's {found[1]}"
            )


def _levels_of(runs: DenoiserRuns, calls: Calls) -> tuple[float, ...] | None:
    """The noise levels of calls of the target, where they are known."""
    try:
        return tuple(noise_levels(runs.scheduler(1), calls.moments))
    except InvalidInput:
        return None


def _is_near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_EQUAL)


def _listed(levels: Sequence[float]) -> str:
    shown = [f"{each:.4g}" for each in levels]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])
