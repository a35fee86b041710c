"""Which calls of two denoisers belong together, where their noise schedules may differ."""

import math
from collections.abc import Sequence
from typing import Any

from dreamreader.engine import DenoiserCall
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.recording.levels import is_flow

SCHEDULES = ("equal", "noise", "fraction")  # of two runs
LEADS = ("source", "target")  # of one run, at whose levels the other denoiser is called
_EQUAL = 1e-3  # relative: tables of schedulers are rounded


def noise_levels(scheduler: Any, moments: Sequence[DenoiserCall]) -> list[float]:
    """The ratio of noise to signal in the denoiser's input at each call.

    Formula: sigma where the input is x + sigma noise (up to a factor), sigma / (1 - sigma) where it
        is (1 - sigma) x + sigma noise (flow matching); infinite at pure noise.

    Raises:
        InvalidInput: the scheduler does not say its noise.
    """
    flow = is_flow(scheduler)
    found = []
    for each in moments:
        if each.sigma is None or math.isnan(each.sigma):
            raise InvalidInput(
                f"the noise level of {type(scheduler).__name__} at step {each.step} is not known; "
                "pair the calls with schedule='fraction'"
            )
        ratio = each.sigma
        if flow:
            ratio = each.sigma / (1 - each.sigma) if each.sigma < 1 else math.inf
        found.append(ratio)
    return found


def match_calls(
    source: Sequence[DenoiserCall],
    target: Sequence[DenoiserCall],
    levels: tuple[Sequence[float], Sequence[float]] | None,
    schedule: str,
) -> list[tuple[int, int]]:
    """Gives the pairs (call of the source, call of the target) that belong together, in order.

    Args:
        source, target: times of the calls.
        levels: of both, see `noise_levels`; not needed for `fraction`.
        schedule: `equal`: as many calls, each at the noise of its partner. `noise` and `fraction`:
            calls that are each other's nearest in the logarithm of the noise, or in the share of
            the trajectory that is done, and no further apart than half a step there; other calls
            are left out.

    Raises:
        UnknownName: there is no such choice.
        InvalidInput: the schedules are not equal, or no two calls belong together.
    """
    if schedule not in SCHEDULES:
        raise UnknownName("schedule of pairs", schedule, SCHEDULES)
    if schedule == "fraction":
        found = _nearest(
            {n: each.fraction for n, each in enumerate(source) if each.evaluation == 0},
            {n: each.fraction for n, each in enumerate(target) if each.evaluation == 0},
        )
        sides = [[each.fraction for each in side] for side in (source, target)]
    else:
        assert levels is not None
        sides = [list(side) for side in levels]
        if schedule == "equal":
            _check_equal(source, target, sides)
            return [(n, n) for n in range(len(source))]
        one, other = ({n: _log(each) for n, each in enumerate(side)} for side in sides)
        found = _nearest(one, other)
    if not found:
        ranges = [f"{max(side):g} to {min(side):g}" for side in sides]
        raise InvalidInput(
            f"no two calls of the models belong together by {schedule}: the source's are at "
            f"{ranges[0]}, the target's at {ranges[1]}"
        )
    return found


def _check_equal(
    source: Sequence[DenoiserCall],
    target: Sequence[DenoiserCall],
    levels: Sequence[Sequence[float]],
) -> None:
    hint = "choose how they belong together: schedule='noise' or 'fraction'"
    if len(source) != len(target):
        raise InvalidInput(
            f"the source's denoiser is called {len(source)} times, the target's {len(target)} "
            f"times; {hint}"
        )
    for number, (a, b) in enumerate(zip(*levels, strict=True)):
        if not math.isclose(a, b, rel_tol=_EQUAL):
            raise InvalidInput(
                f"call {number} has noise {a:.4g} in the source and {b:.4g} in the target (times "
                f"the signal); {hint}"
            )


def _nearest(source: dict[int, float], target: dict[int, float]) -> list[tuple[int, int]]:
    """Numbers that are each other's nearest, no further apart than half a step at that place."""
    if not source or not target:
        return []
    found = []
    for number, value in source.items():
        other = _closest(target, value)
        if _closest(source, target[other]) != number:
            continue
        reach = max(_spacing(source, number), _spacing(target, other)) / 2
        apart = _apart(value, target[other])
        if apart <= max(reach, _EQUAL):
            found.append((number, other))
    return found


def _closest(side: dict[int, float], value: float) -> int:
    return min(side, key=lambda n: (_apart(side[n], value), n))


def _apart(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b)  # infinite and equal are not apart


def _spacing(side: dict[int, float], number: int) -> float:
    """The finite distance to the nearest other value; 0 where there is none."""
    gaps = (_apart(side[number], each) for n, each in side.items() if n != number)
    return min((each for each in gaps if 0 < each < math.inf), default=0.0)


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf
