"""Where a denoiser has its image tokens and its text tokens, as its arguments say it."""

from typing import Any

import pytest
import tiny
import torch

from dreamreader.engine._families import places

TEXT = {"encoder_hidden_states": torch.zeros(1, 5, 8)}


@pytest.mark.parametrize(
    ("shapes", "grid"),
    [
        ({"img_shapes": [[(1, 4, 6)]]}, (4, 6)),
        ({"img_shapes": [(1, 4, 6), (1, 4, 6)]}, (4, 6)),
        ({"img_shapes": [[(1, 4, 6), (1, 2, 2)]]}, (4, 6)),  # the picture, then what it is made of
        ({"img_shapes": []}, None),
        ({}, None),
    ],
)
def test_qwen_image_says_the_grid_of_its_picture(shapes: dict[str, Any], grid: Any) -> None:
    found = places.layout(tiny.pipeline("qwen-image").transformer, {**TEXT, **shapes})
    assert (found.grid, found.text) == (grid, 5)
