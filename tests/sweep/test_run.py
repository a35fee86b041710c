"""Sweeps that cannot mean anything are refused before anything runs."""

import pytest
import torch

from dreamreader import load
from dreamreader.errors import InvalidInput
from dreamreader.sweep import Cell, job, over_cells


def test_a_sweep_that_changes_nothing_is_refused() -> None:
    settings = {"num_inference_steps": 1, "output_type": "latent"}
    work = job(
        load("shapes-unet"), ["a red star"], 0, lambda run: [0.5] * len(run.rows), None, settings
    )
    cells = [Cell("mid", "unet.mid_block"), Cell("as it is", ())]
    with pytest.raises(InvalidInput, match="edits_of gives no edits for mid; a cell that stays"):
        over_cells(cells, work, lambda cells, pairs: [])
    with pytest.raises(InvalidInput, match="over_cells: no cells are given"):
        over_cells([], work, lambda cells, pairs: [])
    found = over_cells(cells[1:], work, lambda cells, pairs: [])
    assert torch.tensor(found).tolist() == [[0.5]]
