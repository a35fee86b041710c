"""Calls of two schedules: by equal noise, by the nearest, by the share of the way."""

import math
from typing import Any

import pytest

from dreamreader.engine._clock import DenoiserCall
from dreamreader.errors import InvalidInput
from dreamreader.recording.schedules import match_calls, noise_levels


def moments(levels: list[float], evaluations: list[int] | None = None) -> list[DenoiserCall]:
    count = len(levels)
    return [
        DenoiserCall(
            n, 0.0, each, n / count, 0 if evaluations is None else evaluations[n], ("cond",)
        )
        for n, each in enumerate(levels)
    ]


def match(one: list[float], other: list[float], schedule: str) -> list[tuple[int, int]]:
    return match_calls(moments(one), moments(other), (one, other), schedule)


def test_equal_schedules_have_equal_noise_at_every_call() -> None:
    assert match([8, 4, 2], [8.001, 4, 2], "equal") == [(0, 0), (1, 1), (2, 2)]
    assert match([math.inf, 2], [math.inf, 2], "equal") == [(0, 0), (1, 1)]
    with pytest.raises(InvalidInput, match=r"call 1 has noise 4 in the source and 5 in the target"):
        match([8, 4, 2], [8, 5, 2], "equal")
    with pytest.raises(InvalidInput, match="call 0 has noise inf in the source and 14.6 in the"):
        match([math.inf], [14.6], "equal")


def test_by_noise_each_call_has_its_nearest_and_no_far_one() -> None:
    assert match([8, 4, 2], [8, 5.5, 4, 2.8, 2], "noise") == [(0, 0), (1, 2), (2, 4)]
    assert match([8, 5.5, 4, 2.8, 2], [8, 4, 2], "noise") == [(0, 0), (2, 1), (4, 2)]
    # beyond the other's range there is no partner: 80 and 40 against 8
    assert match([80, 40, 8, 4], [8, 4, 2], "noise") == [(2, 0), (3, 1)]
    assert match([math.inf, 4, 2], [math.inf, 4, 2], "noise") == [(0, 0), (1, 1), (2, 2)]
    assert match([math.inf, 4, 2], [14.6, 4, 2], "noise") == [(1, 1), (2, 2)]
    with pytest.raises(InvalidInput, match="by noise: the source's are at 80 to 40, the target's"):
        match([80, 40], [2, 1], "noise")


def test_by_fraction_the_way_counts_and_second_evaluations_do_not() -> None:
    assert match([3, 2, 1], [6, 5, 4, 3, 2, 1], "fraction") == [(0, 0), (1, 2), (2, 4)]
    heun = moments([4, 3, 2, 1], [0, 1, 0, 1])
    found = match_calls(heun, moments([4, 2]), None, "fraction")
    assert found == [(0, 0), (2, 1)]


@pytest.mark.parametrize(
    "name, more, convert",
    [
        ("EulerDiscreteScheduler", {}, lambda s: s),
        ("FlowMatchEulerDiscreteScheduler", {}, lambda s: s / (1 - s) if s < 1 else math.inf),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
         lambda s: s / (1 - s)),
    ],
)  # fmt: skip
def test_noise_is_a_ratio_whatever_the_scheduler_calls_sigma(
    name: str, more: dict[str, Any], convert: Any
) -> None:
    import diffusers

    scheduler = getattr(diffusers, name)(**more)
    scheduler.set_timesteps(4)
    sigmas = [float(each) for each in scheduler.sigmas[:4]]
    assert noise_levels(scheduler, moments(sigmas)) == pytest.approx(list(map(convert, sigmas)))
    unknown = [DenoiserCall(0, 0.0, None, 0.0, 0, ("cond",))]
    with pytest.raises(InvalidInput, match=f"the noise level of {name} at step 0 is not known"):
        noise_levels(scheduler, unknown)
