"""Trainings that cannot mean anything are refused before, or instead of, a result."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamreader.errors import InvalidInput
from dreamreader.fitting import NonFiniteLoss, Recipe, fit

ROWS = [torch.eye(3)]


def distance(layer: nn.Module, x: Tensor) -> Tensor:
    return (layer(x) - x).square().mean()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 2.5}, "steps must be at least 1, got 2.5"),
        ({"steps": True}, "steps must be at least 1, got True"),
        ({"steps": "3"}, "steps must be at least 1, got '3'"),
        ({"warmup": -3}, "warmup must be at least 0, got -3"),
        ({"grad_clip": -1.0}, "grad_clip must be positive, got -1.0"),
        ({"grad_clip": 0.0}, "grad_clip must be positive, got 0.0"),
        ({"lr": "0.1"}, "lr must be positive, got '0.1'"),
    ],
)
def test_recipes(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        Recipe(**given)


def test_one_module_under_two_names() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(InvalidInput, match="a module stands under two names"):
        fit({"a": layer, "b": layer}, distance, ROWS, Recipe(steps=2))


def test_validations_that_are_never_finite() -> None:
    recipe = Recipe(steps=4, validate_every=1)
    with pytest.raises(NonFiniteLoss, match="no validation was finite"):
        fit(nn.Linear(3, 3), distance, ROWS, recipe, validate=lambda: float("nan"))
