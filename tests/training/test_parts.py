"""Parts of specs: the options of the library, no more and no fewer, with its usual values."""

import inspect

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.probes import fit
from dreamreader.reft import Recipe, Reft
from dreamreader.reft.usual import USUAL
from dreamreader.specs.load import check_spec
from dreamreader.training import ProbeTraining, Training


def test_a_recipe_has_all_that_train_takes():
    recipe = Training().recipe
    assert set(recipe) == set(Recipe.__dataclass_fields__) - {"epochs"}
    assert Recipe(**recipe).steps == 300


@pytest.mark.parametrize("loss", ["activations", "noise"])
def test_the_usual_values_are_those_of_fit_pairs(loss: str):
    recipe = Training(loss=loss).recipe
    assert USUAL[loss].items() <= recipe.items()


def test_what_is_said_replaces_what_is_usual():
    recipe = Training(loss="noise", lr=0.5, steps=3, batch_size=2, grad_clip=0.1).recipe
    found = {name: recipe[name] for name in ("lr", "steps", "batch_size", "grad_clip")}
    assert found == {"lr": 0.5, "steps": 3, "batch_size": 2, "grad_clip": 0.1}


def test_options_of_an_optimiser_reach_it():
    training = Training(optimizer={"SGD": {"momentum": 0.9}}, lr=0.25, weight_decay=0.5)
    made = Recipe(**training.recipe).build_optimizer(Reft({"a": 4}, rank=1).parameters())
    assert isinstance(made, torch.optim.SGD)
    group = made.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.9, 0.5)


def test_an_option_that_an_optimiser_has_not_is_named():
    training = Training(optimizer={"SGD": {"mass": 1}})
    with pytest.raises(InvalidInput, match="train: optimizer SGD: .*'mass'"):
        Recipe(**training.recipe).build_optimizer(Reft({"a": 4}, rank=1).parameters())


def test_a_probe_takes_all_that_fit_takes():
    own = {"classes", "groups", "subject"}  # come with the rows
    named = {n for n, p in inspect.signature(fit).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(ProbeTraining.model_fields) == named - own
    usual = {n: p.default for n, p in inspect.signature(fit).parameters.items() if n in named}
    found = ProbeTraining().options
    assert found == {name: usual[name] if name != "hidden" else [128, 128] for name in found}


@pytest.mark.parametrize(
    ("part", "content", "text"),
    [
        (Training, {"optimizer": "Adm"}, "optimizer: unknown optimizer 'Adm'; nearest: Adam"),
        (Training, {"optimizer": {"SGD": {}, "Adam": {}}}, "a name, or one name with options"),
        (Training, {"loss": "noise", "trajectory": "own"}, "own is for the loss activations"),
        (Training, {"patience": 3, "validation": 0}, "patience needs rows that are held out"),
        (Training, {"variant": "lora"}, "variant: input should be 'loreft', 'direft'"),
        (Training, {"rnk": 3}, "rnk: unknown field; nearest: rank"),
        (Training, {"keep": {"data": {"prompts": ["a"]}, "weight": 0}}, "keep.weight: "),
        (ProbeTraining, {"hidden": [1, 2, 3]}, "hidden: list should have at most 2 items"),
        (ProbeTraining, {"holdout": 2}, "holdout: input should be greater than or equal to 3"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_cannot_be_right_is_told(part, content, text: str):
    with pytest.raises(InvalidInput) as error:
        check_spec(part, content)
    assert text in str(error.value)
