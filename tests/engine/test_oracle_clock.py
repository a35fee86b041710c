"""The clock says at every denoiser call what the hand-written loop says."""

from typing import Any

import pytest
import torch

from tests.oracle import Call
from tests.oracle.cases import CASES, Case


def _heard(case: Case) -> tuple[list[Call], torch.Tensor]:
    """What the clock says inside each denoiser call of a real run, and the run's latents."""
    from dreamreader.engine._clock import Clock

    pipe = case.pipe()
    component, path = case.attention
    heard: list[Call] = []

    def listen(module: Any, inputs: Any) -> None:
        now = clock.now()
        assert now.sigma is not None
        heard.append(
            Call(now.step, now.timestep, now.sigma, now.fraction, now.evaluation, now.branches)
        )

    site = getattr(pipe, component).get_submodule(path)
    handle = site.register_forward_pre_hook(listen)
    with Clock(pipe) as clock:
        latents = pipe(**case.pipeline_arguments()).images
    handle.remove()
    return heard, latents


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_clock_agrees_with_the_loop_by_hand(case: Case) -> None:
    truth = case.truth
    heard, latents = _heard(case)
    assert [(call.step, call.evaluation, call.branches) for call in heard] == [
        (call.step, call.evaluation, call.branches) for call in truth.calls
    ]
    for name in ("timestep", "sigma", "fraction"):
        assert [getattr(call, name) for call in heard] == pytest.approx(
            [getattr(call, name) for call in truth.calls], rel=1e-3, abs=1e-6
        ), name
    # listening changes nothing
    error = 1e-5 if case.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(latents, truth.latents, rtol=error, atol=error)
