"""An edit of one branch in a window of steps does what the hand-made change does, and no more."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import Change
from tests.oracle.cases import CASES, Case

ALPHA = 3.0
BY_NAME = {case.name: case for case in CASES}


def _window(case: Case) -> tuple[list[int], tuple[str, ...]]:
    """The second and third step, around a change of guidance, and the branches that run in them."""
    calls = case.truth.calls
    steps = sorted({call.step for call in calls})
    steps = steps[1:3] if len(steps) > 2 else steps[:1]
    found = [branch for call in calls if call.step in steps for branch in call.branches]
    return steps, tuple(dict.fromkeys(found))


def _direction(case: Case, pipe: Any) -> Tensor:
    component, path = case.attention
    module = getattr(pipe, component).get_submodule(path)
    output = module.to_out[0] if hasattr(module, "to_out") else module
    rng = torch.Generator().manual_seed(1)
    return torch.randn(output.out_features, generator=rng)


def _edited(case: Case, edits: list[Any], pipe: Any) -> Tensor:
    import dreamreader as dr

    reader = dr.Reader(pipe)
    with reader.editing(edits):
        return pipe(**case.pipeline_arguments()).images


def _push(rows: Tensor, vector: Tensor, alpha: float | Tensor = ALPHA) -> Tensor:
    """In float32 with one rounding at the end, as the formula has it."""
    return (rows.float() + alpha * vector).to(rows.dtype)


def _close(ours: Tensor, truth: Tensor, plain: Tensor) -> None:
    """The error is far below the effect."""
    effect = float((truth - plain).abs().max())
    assert effect > 1e-2
    coarse = truth.dtype == torch.bfloat16
    assert float((ours - truth).abs().max()) < (0.1 if coarse else 1e-3) * effect


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steering_one_branch_in_some_steps(case: Case) -> None:
    import dreamreader as dr

    steps, branches = _window(case)
    site = ".".join(case.attention)
    plain = case.truth.latents
    pipe = case.pipe()
    direction = _direction(case, pipe)
    if case.scheduler is not None:  # the branches do not depend on the solver: one will do
        branches = branches[CASES.index(case) % len(branches) :][:1]
    for branch in branches:
        truth = _by_hand(case, lambda step, name, rows: _push(rows, direction), branch, steps)
        edit = dr.Steer(site, direction, ALPHA, steps=steps, branch=branch)
        _close(_edited(case, [edit], pipe), truth, plain)
    # afterwards the subject is as it was
    again = pipe(**case.pipeline_arguments()).images
    assert torch.equal(again, case.pipe()(**case.pipeline_arguments()).images)


def _by_hand(case: Case, apply: Any, branch: str = "cond", steps: Any = (1, 2)) -> Tensor:
    return case.by_hand(case.pipe(), Change(case.attention[1], branch, steps, apply)).latents


@pytest.mark.parametrize("name", ["sd", "sd-HeunDiscrete", "sd-img2img-EulerDiscrete", "lumina2"])
@pytest.mark.parametrize("window", ["timesteps", "sigmas", "fraction"])
def test_windows_of_time_choose_the_same_calls(name: str, window: str) -> None:
    """A window around one step's own values holds that step, and no call of another value."""
    import dreamreader as dr

    case = BY_NAME[name]
    plain = case.truth
    calls = [call for call in plain.calls if "cond" in call.branches]
    key = {"timesteps": "timestep", "sigmas": "sigma", "fraction": "fraction"}[window]
    value = getattr(calls[len(calls) // 2], key)
    inside = (value * 0.999 - 1e-6, value * 1.001 + 1e-6)
    pipe = case.pipe()
    direction = _direction(case, pipe)

    # by hand: push at every call whose own value lies in the window, whatever its step
    turns = iter(calls)

    def push(step: int, branch: str, rows: Tensor) -> Tensor:
        now = getattr(next(turns), key)
        return rows + ALPHA * direction if inside[0] <= now <= inside[1] else rows

    truth = _by_hand(case, push, steps=range(100))
    site = ".".join(case.attention)
    edit = dr.Steer(site, direction, ALPHA, branch="cond", **{window: inside})
    _close(_edited(case, [edit], pipe), truth, plain.latents)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux-true-cfg", "sd3-images"])
def test_each_row_has_its_own_strength(name: str) -> None:
    import dreamreader as dr

    case = BY_NAME[name]
    pipe = case.pipe()
    direction = _direction(case, pipe)
    alphas = torch.linspace(0, 4, len(case.seeds))
    truth = _by_hand(case, lambda step, branch, rows: _push(rows, direction, alphas[:, None, None]))
    plain = case.truth.latents
    site = ".".join(case.attention)
    edit = dr.Steer(site, direction, alphas.tolist(), branch="cond", steps=range(1, 3))
    ours = _edited(case, [edit], pipe)
    _close(ours, truth, plain)
    assert torch.equal(ours[0], pipe(**case.pipeline_arguments()).images[0])


@pytest.mark.parametrize("name", ["sd", "flux-true-cfg", "lumina2", "sd-unguided"])
def test_without_a_branch_every_branch_is_edited(name: str) -> None:
    import dreamreader as dr

    case = BY_NAME[name]
    pipe = case.pipe()
    direction = _direction(case, pipe)
    component, path = case.attention
    module = getattr(pipe, component).get_submodule(path)
    handle = module.register_forward_hook(lambda module, inputs, output: output + ALPHA * direction)
    truth = pipe(**case.pipeline_arguments()).images
    handle.remove()
    plain = case.truth.latents
    ours = _edited(case, [dr.Steer(f"{component}.{path}", direction, ALPHA)], pipe)
    _close(ours, truth, plain)


@pytest.mark.parametrize("name", ["sd", "pixart-sigma", "qwen-image"])
def test_edits_of_one_site_follow_one_another(name: str) -> None:
    import dreamreader as dr

    case = BY_NAME[name]
    pipe = case.pipe()
    direction = _direction(case, pipe)
    unit = direction / direction.norm()

    def both(step: int, branch: str, rows: Tensor) -> Tensor:
        rows = rows + ALPHA * direction
        if step == 2:
            rows = rows - (rows @ unit)[..., None] * unit
        return rows * 1.5

    truth = _by_hand(case, both)
    plain = case.truth.latents
    site = ".".join(case.attention)
    where = {"branch": "cond", "steps": [1, 2]}
    edits = [
        dr.Steer(site, direction, ALPHA, **where),
        dr.Ablate(site, "project", direction=direction, branch="cond", steps=2),
        dr.Scale(site, 1.5, **where),
    ]
    _close(_edited(case, edits, pipe), truth, plain)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "cogview4", "lumina2"])
def test_function_edits_get_their_branch_only(name: str) -> None:
    import dreamreader as dr

    case = BY_NAME[name]
    truth = _by_hand(case, lambda step, branch, rows: 4 * rows.roll(1, 1).tanh(), "uncond")
    plain = case.truth.latents
    site = ".".join(case.attention)
    edit = dr.Edit(site, lambda rows: 4 * rows.roll(1, 1).tanh(), branch="uncond", steps=[1, 2])
    _close(_edited(case, [edit], case.pipe()), truth, plain)
