"""The hand-written loops end in the pipelines' own latents, and their change does what it says."""

import pytest
import torch

from .cases import CASES, Case
from .trace import Change

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loop_ends_where_the_pipeline_does(case: Case) -> None:
    theirs = case.pipe()(**case.pipeline_arguments()).images
    ours = case.truth
    assert torch.isfinite(theirs).all() and theirs.std() > 0.1
    error = 1e-5 if case.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours.latents, theirs, rtol=error, atol=error)


@pytest.mark.parametrize("name", ["sd", "sd-HeunDiscrete", "flux-true-cfg", "lumina2"])
@pytest.mark.parametrize("at", ["out", "in"])
def test_change_touches_its_branch_and_steps_only(name: str, at: str) -> None:
    case = BY_NAME[name]
    seen = []

    def shift(step: int, branch: str, rows: torch.Tensor) -> torch.Tensor:
        seen.append((step, branch, len(rows)))
        return rows + 1

    plain = case.truth
    path = case.attention[1]
    if at == "in" and not path.endswith("to_out.0"):
        path += ".to_out.0"
    changed = case.by_hand(case.pipe(), Change(path, "uncond", range(1, 3), shift, at))
    assert changed.calls == plain.calls
    wanted = [call.step for call in plain.calls if "uncond" in call.branches]
    assert seen == [(step, "uncond", 2) for step in wanted if step in (1, 2)]
    assert (changed.latents - plain.latents).abs().max() > 1e-2

    nothing = case.by_hand(case.pipe(), Change(path, "uncond", range(9, 12), shift, at))
    assert torch.equal(nothing.latents, plain.latents)


def test_heun_evaluates_twice_but_for_the_last_step() -> None:
    calls = BY_NAME["sd-HeunDiscrete"].truth.calls
    assert [(call.step, call.evaluation) for call in calls] == [
        *((step, evaluation) for step in range(4) for evaluation in (0, 1)),
        (4, 0),
    ]
    # the second evaluation stands where the next step starts
    assert calls[1].sigma == calls[2].sigma < calls[0].sigma


def test_kdpm2_evaluates_at_the_geometric_middle() -> None:
    calls = BY_NAME["sd-KDPM2Discrete"].truth.calls
    assert [(call.step, call.evaluation) for call in calls[-3:]] == [(3, 0), (3, 1), (4, 0)]
    assert calls[1].sigma ** 2 == pytest.approx(calls[0].sigma * calls[2].sigma)


def test_pndm_starts_with_one_heun_step() -> None:
    calls = BY_NAME["sd-PNDM"].truth.calls
    assert [(call.step, call.evaluation) for call in calls] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
    ]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sd-img2img", [2, 3]),  # strength 0.6 of 4 steps: two are left
        ("flux-img2img", [1, 2, 3]),
        ("sd-img2img-HeunDiscrete", [2, 2, 3, 3, 4]),
        ("sd-img2img-PNDM", [1, 2, 3, 4]),  # entries 2 to 5 of six; the pair 0, 1 is its first step
    ],
)
def test_img2img_starts_on_the_way(name: str, steps: list[int]) -> None:
    calls = BY_NAME[name].truth.calls
    assert [call.step for call in calls] == steps
    assert calls[0].fraction == steps[0] / BY_NAME[name].steps
    assert sum(call.evaluation for call in calls) == len(steps) - len(set(steps))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.pipeline == "sd"], ids=lambda case: case.name
)
def test_sigma_is_the_noise_that_the_scheduler_adds(case: Case) -> None:
    """At a step's start the scheduler's own add_noise mixes picture and noise in that ratio."""
    pipe = case.pipe()
    calls = case.by_hand(pipe).calls
    pipe.scheduler.set_timesteps(case.steps)
    for index, call in enumerate(calls):
        if call.evaluation == 1 or call.timestep != int(call.timestep):
            continue
        if hasattr(pipe.scheduler, "set_begin_index"):
            pipe.scheduler.set_begin_index(index)
        time = torch.tensor([call.timestep]).to(pipe.scheduler.timesteps.dtype)
        signal, noise = (
            pipe.scheduler.add_noise(torch.tensor([[clean]]), torch.tensor([[dirt]]), time).item()
            for clean, dirt in ((1.0, 0.0), (0.0, 1.0))
        )
        assert noise / signal == pytest.approx(call.sigma, rel=1e-3)
