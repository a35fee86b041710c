"""What is recorded at a site is what the hand-written loop saw pass there, in the right places."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.oracle import Change
from tests.oracle.cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}
NAMES = [*tiny.PIPELINES, "sd-HeunDiscrete", "sd-PNDM", "sd-img2img-KDPM2Discrete", "sd3-images"]


def _passing(case: Case, branch: str, at: str = "out") -> list[Tensor]:
    """Each tensor of `branch` that passes the site by hand, [rows, tokens, features] a call."""
    seen: list[Tensor] = []

    def keep(step: int, name: str, rows: Tensor) -> Tensor:
        seen.append(rows.clone())
        return rows

    path = case.attention[1]
    if at == "in" and not path.endswith("to_out.0"):
        path += ".to_out.0"
    case.by_hand(case.pipe(), Change(path, branch, range(100), keep, at))
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_recording_by_branch_and_step(name: str) -> None:
    import dreamreader as dr

    case = BY_NAME[name]
    component, path = case.attention
    site = f"{component}.{path}"
    pipe = case.pipe()
    known = list(dict.fromkeys(branch for call in case.truth.calls for branch in call.branches))
    # sequences of Lumina2 are as long as their prompts: its branches fit no one tensor
    groups = [[branch] for branch in known] if name == "lumina2" else [known]
    for group in groups:
        with dr.Reader(pipe).recording([dr.Record(site, branch=group)]) as cache:
            pipe(**case.pipeline_arguments())
        _compare(case, cache[site], group)


def _compare(case: Case, found: Any, group: list[str]) -> None:
    assert len(found.rows) == len(case.seeds)
    assert set(found.branches) == set(group)
    for branch in group:
        calls = [call for call in case.truth.calls if branch in call.branches]
        assert [(at.step, at.evaluation) for at in found.steps] == [
            (call.step, call.evaluation) for call in calls
        ]
        by_hand = torch.stack(_passing(case, branch), dim=1)  # [rows, steps, tokens, features]
        ours = found.select(branch=branch).tensor
        assert ours.shape == by_hand.shape
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "pixart-sigma", "flux-true-cfg", "lumina2"])
def test_heads_are_the_input_of_the_output_projection(name: str) -> None:
    import dreamreader as dr

    case = BY_NAME[name]
    component, path = case.attention
    site = f"{component}.{path.removesuffix('.to_out.0')}:heads"
    pipe = case.pipe()
    with dr.Reader(pipe).recording([dr.Record(site, branch="cond", steps=[1])]) as cache:
        pipe(**case.pipeline_arguments())
    found = cache[site].tensor  # [rows, 1, tokens, heads, d_head]
    by_hand = _passing(case, "cond", at="in")[1]
    torch.testing.assert_close(found[:, 0].flatten(-2), by_hand, rtol=1e-4, atol=1e-4)
