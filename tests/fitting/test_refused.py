"""Trainings that cannot mean anything are refused before, or instead of, a result."""

import re
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


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"module": 3}, "fit: module is a torch module, or several by name, got int 3"),
        ({"recipe": "x"}, "fit: recipe is a Recipe, or one for each module by name, got str 'x'"),
        ({"objective": 3}, "fit: objective is a function, or an Objective, got int 3"),
        ({"folder": 3}, "fit: folder is the path of a folder, or None, got int 3"),
        ({"save_every": "2"}, "fit: save_every is a number of steps, got '2'"),
        ({"check_every": 1.5}, "fit: check_every is a number of steps, got 1.5"),
        ({"validate": 3}, "fit: validate is a function that gives a loss, got 3"),
        ({"after_step": 4}, "fit: after_step is a function of"),
        ({"state": 3}, "fit: state is objects by name, got int 3"),
        ({"of": [1]}, "fit: of is plain values by name, got list"),
        ({"progress": 2}, "progress=2: give True, False, or a function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_other_kinds_are_named(changes: dict[str, Any], text: str):
    given: dict[str, Any] = {
        "module": torch.nn.Linear(2, 2),
        "objective": lambda module, x: module(x).sum(),
        "batches": [torch.eye(2)],
        "recipe": Recipe(steps=2),
    }
    with pytest.raises(InvalidInput, match=re.escape(text)):
        fit(**given | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 1.5}, "train: seed is a number, got 1.5"),
        ({"validation": "a"}, "train: validation is a number, got 'a'"),
        ({"weight_decay": True}, "train: weight_decay is a number, got True"),
        ({"optimizer": 3}, "train: optimizer is a name, {name: options} or a function, got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_a_recipe_of_other_kinds_are_named(changes: dict[str, Any], text: str):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        Recipe(**changes)
