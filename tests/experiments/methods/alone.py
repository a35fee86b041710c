"""What tests of learned edits share: rows run alone, and runs that are stopped."""

import math
from typing import Any

import pytest
import torch

from dreamreader.engine import Reader
from dreamreader.experiments.results import Results
from dreamreader.zoo import SETTINGS

STEPS = {**SETTINGS, "num_inference_steps": 2, "output_type": "pt"}


def check_alone(results: Results, row: Any, reader: Reader, edits: Any) -> None:
    """A row of a batch has the picture that the edits give for its prompt alone."""
    with torch.inference_mode():
        plain, moved = (
            reader.run(row["prompt"], edits=each, seeds=[0], **STEPS).images[0]
            for each in ([], edits)
        )
    distance = float((moved - plain).square().mean().sqrt())
    assert distance > 0.01 and row["pixel_distance"] == pytest.approx(distance, rel=0.01)
    kept = torch.tensor(list(results.image(row).tobytes())).reshape(64, 64, 3).permute(2, 0, 1)
    assert (kept / 255 - moved).abs().max() < 2 / 255


class Stopping:
    """Gives the mean of each picture; may be stopped at a batch."""

    name = "brightness"
    needs = frozenset({"images"})
    compares = False

    def __init__(self, left: float = math.inf):
        self.left = left

    def measure(self, got: Any, reference: Any) -> dict[str, list[float]]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return {self.name: got.images.mean((1, 2, 3)).tolist()}
