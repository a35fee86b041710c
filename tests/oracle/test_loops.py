"""The hand-written loops end in the pipelines' own latents."""

import pytest
import torch

from .cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loop_ends_where_the_pipeline_does(case: Case) -> None:
    theirs = case.pipe()(**case.pipeline_arguments()).images
    ours = case.by_hand(case.pipe())
    assert torch.isfinite(theirs).all() and theirs.std() > 0.1
    torch.testing.assert_close(ours.latents, theirs, rtol=1e-5, atol=1e-5)
