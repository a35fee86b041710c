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
    """Two steps in the middle of the run, and the branches that run in them."""
    calls = case.by_hand(case.pipe()).calls
    steps = sorted({call.step for call in calls})[-3:-1]
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steering_one_branch_in_some_steps(case: Case) -> None:
    import dreamreader as dr

    steps, branches = _window(case)
    component, path = case.attention
    plain = case.by_hand(case.pipe()).latents
    for branch in branches:
        pipe = case.pipe()
        direction = _direction(case, pipe)
        change = Change(path, branch, steps, lambda step, name, rows, v=direction: rows + ALPHA * v)
        truth = case.by_hand(case.pipe(), change).latents
        edit = dr.Steer(f"{component}.{path}", direction, ALPHA, steps=steps, branch=branch)
        ours = _edited(case, [edit], pipe)
        scale = (truth - plain).abs().max()
        assert scale > 1e-2
        assert (ours - truth).abs().max() < 1e-4 * max(1.0, float(truth.abs().max())), branch
        # afterwards the subject is as it was
        again = pipe(**case.pipeline_arguments()).images
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
