"""Training: exact resume, early stop, optimisers, batches, what is not finite."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reft.subjects import LAYER, language
from reft.training import WIDTHS, made_up, trained

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft import ActivationMatch, LanguageLoss, NonFiniteLoss, Pairs, Reft, train
from dreamreader.reft.batches import Batches

KILLED = Path(__file__).with_name("killed.py")


def parameters(reft: Reft) -> list[torch.Tensor]:
    return [each.detach().clone() for each in reft.parameters()]


def equal(one: Reft, other: Reft) -> bool:
    return all(map(torch.equal, parameters(one), parameters(other)))


def test_killed_and_started_again_it_ends_equal_to_the_bit(tmp_path: Path):
    found = subprocess.run([sys.executable, KILLED, tmp_path, "23"], check=False)
    assert found.returncode == -9
    done: list[int] = []
    reft, history = trained(tmp_path, progress=lambda event: done.append(event.done))
    assert done[0] == 22  # the last state before the kill was that of step 21
    whole, wanted = trained()
    assert equal(reft, whole)
    assert history == wanted
    assert equal(Reft.load(tmp_path / "reft.safetensors"), whole)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adam", "LBFGS", "Adafactor"])
def test_any_optimiser_of_torch_resumes_exactly(tmp_path: Path, name: str):
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == 8:
            raise Stop

    common: dict[str, Any] = {"optimizer": name, "steps": 12, "grad_clip": None}
    with pytest.raises(Stop):
        trained(tmp_path, progress=stop, **common)
    assert equal(trained(tmp_path, **common)[0], trained(**common)[0])


def test_patience_counts_on_after_a_stop(tmp_path: Path):
    class Stop(Exception):
        pass

    common: dict[str, Any] = {"lr": 0.5, "steps": 200, "schedule": "constant", "patience": 3}
    common |= {"grad_clip": None, "save_every": 5}
    _, whole = trained(**common)
    last = len(whole.losses) - 5  # two validations without a better one are over

    def stop(event: Any) -> None:
        if event.done == last:
            raise Stop

    with pytest.raises(Stop):
        trained(tmp_path, progress=stop, **common)
    assert trained(tmp_path, **common)[1] == whole and whole.stopped


def test_a_function_makes_the_optimiser_with_rates_of_its_own():
    def half(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01)

    mine, _ = trained(optimizer=half, lr=5.0)
    assert equal(mine, trained(optimizer="SGD", lr=0.01)[0])


def test_the_rate_warms_up_and_falls():
    from dreamreader.reft import Recipe

    recipe = Recipe(steps=10, warmup=2)
    assert [recipe.share(0), recipe.share(1), recipe.share(2)] == [0.5, 1.0, 1.0]
    assert recipe.share(6) == pytest.approx(0.5) and recipe.share(9) < 0.05
    assert Recipe(steps=10, schedule="linear").share(5) == 0.5
    assert Recipe(steps=10, schedule="constant").share(9) == 1.0


def test_it_stops_without_a_better_one_and_keeps_the_best():
    reft, history = trained(lr=0.5, steps=200, schedule="constant", patience=3, grad_clip=None)
    values = [value for _, value in history.validation]
    best = values.index(min(values))
    assert history.stopped and len(values) == best + 4
    assert history.best == 5 * (best + 1) and len(history.losses) == history.best + 15
    batches = Batches(ActivationMatch(made_up()), 5, 0.25, 0)
    assert batches.validation(reft) == pytest.approx(min(values))


def test_batches_take_every_training_row_once_and_no_held_out_row():
    loss = ActivationMatch(made_up(rows=10, calls=3))
    batches = Batches(loss, 8, 0.2, 0)
    assert len(batches.held) == 2 and len(batches.rows) == 8
    seen = []
    for step in range(3):
        batch = batches[step]
        seen += list(zip(batch.rows.tolist(), batch.moments.tolist(), strict=True))
    assert len(set(seen)) == 24 and not {row for row, _ in seen} & set(batches.held.tolist())
    later = [(batches[step].rows * 3 + batches[step].moments).tolist() for step in (3, 4, 5)]
    assert sorted(sum(later, [])) == sorted(3 * row + call for row, call in seen)
    assert sum(later, []) != [3 * row + call for row, call in seen]
    again = Batches(loss, 8, 0.2, 0)
    assert torch.equal(again[2].rows, batches[2].rows) and again[2].seed == batches[2].seed
    assert not torch.equal(Batches(loss, 8, 0.2, 1)[2].rows, batches[2].rows)


def test_a_loss_that_is_not_finite_names_step_rows_and_site_and_keeps_the_last_good(tmp_path: Path):
    pairs = made_up()
    pairs.base["b"][4, 1, 0, 0] = float("inf")
    loss = ActivationMatch(pairs, {"a": 1.0, "b": 1.0})
    batches = Batches(loss, 5, 0.0, 0)
    wrong = next(n for n in range(5) if (batches[n].rows * 2 + batches[n].moments == 9).any())
    rows = ", ".join(map(str, batches[wrong].rows.tolist()))
    reft = Reft(WIDTHS, 2)
    said = rf"step {wrong}: the loss is (nan|inf) on rows {rows}; site: b. A smaller lr"
    with pytest.raises(NonFiniteLoss, match=said):
        train(reft, loss, steps=30, batch_size=5, folder=tmp_path, schedule="constant")
    assert wrong > 0 and not equal(reft, Reft(WIDTHS, 2))
    good = Reft(WIDTHS, 2)
    train(good, loss, steps=wrong - 1, batch_size=5, schedule="constant")
    assert equal(reft, good)  # the parameters with which the loss was last finite
    assert equal(Reft.load(tmp_path / "reft.safetensors"), good)


def test_a_step_too_far_leaves_the_parameters_before_it():
    start = Reft(WIDTHS, 2)
    with pytest.raises(NonFiniteLoss, match="step 1: a parameter is not finite on rows .*site: a"):
        train(start, ActivationMatch(made_up()), lr=float("inf"), schedule="constant", steps=5)
    assert equal(start, Reft(WIDTHS, 2))


def test_in_a_model_the_site_is_the_first_whose_values_are_not_finite():
    reader = language()
    reft = Reft.for_sites(reader, "model.layers.*", 2)
    with torch.no_grad():
        reft.adapters[LAYER].weight.fill_(3e38)
    loss = LanguageLoss(reader, ["a cat"], [" sleeps"])
    with pytest.raises(NonFiniteLoss, match=f"site: {LAYER}. "):
        train(reft, loss, steps=2)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"optimizer": "AdamV"}, UnknownName, "unknown optimizer 'AdamV'; nearest: Adam"),
        ({"schedule": "cosin"}, UnknownName, "unknown schedule 'cosin'; nearest: cosine"),
        ({"steps": 0}, InvalidInput, "train: steps must be at least 1, got 0"),
        ({"validation": 1.0}, InvalidInput, "validation is a share from 0 to 1, got 1.0"),
        ({"validation": 0.99}, InvalidInput, "takes 12 of 12 rows, none is left"),
        ({"validation": 0.0, "patience": 2}, InvalidInput, "patience needs a share of rows"),
        ({"patience": 0}, InvalidInput, "train: patience must be at least 1, got 0"),
    ],
    ids=["optimizer", "schedule", "steps", "all", "nearly all", "patience", "no patience"],
)
def test_wrong_inputs_say_what_is_wrong(given: dict[str, Any], kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        trained(**given)


def test_a_folder_goes_on_with_its_own_recipe_only(tmp_path: Path):
    trained(tmp_path, steps=7)
    text = re.escape(f"{tmp_path} holds a training with lr=0.02, not 0.01; use another folder")
    with pytest.raises(InvalidInput, match=text):
        trained(tmp_path, steps=7, lr=0.01)


@pytest.mark.parametrize(
    ("adapters", "rows", "text"),
    [
        ({"rank": 3}, 12, r"adapters=\['a, width=12, rank=1, variant=loreft', .*rank=3"),
        ({"rank": 1, "variant": "direft"}, 12, r"adapters=.* not .*variant=direft"),
        ({"rank": 1, "steps": 2}, 12, r"adapters=.* not .*steps=2"),
        ({"rank": 1, "tokens": [0]}, 12, r"tokens='None', not '\[0\]'"),
        ({"rank": 1}, 9, "rows=12, not 9"),
    ],
    ids=["rank", "variant", "steps", "tokens", "rows"],
)
def test_a_folder_goes_on_with_its_own_adapters_and_rows_only(
    tmp_path: Path, adapters: dict[str, Any], rows: int, text: str
):
    train(Reft(WIDTHS, 1), ActivationMatch(made_up()), steps=2, folder=tmp_path)
    with pytest.raises(InvalidInput, match=f"holds a training with {text}.*use another folder"):
        train(Reft(WIDTHS, **adapters), ActivationMatch(made_up(rows)), steps=2, folder=tmp_path)


def test_a_state_that_is_not_finite_is_never_written(tmp_path: Path):
    def made(parameters: Any) -> torch.optim.Optimizer:
        class Breaks(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                list(parameters)[0].data[0, 0, 0] = float("nan")
                return loss

        return Breaks(parameters, lr=0.01)

    loss, start = ActivationMatch(made_up()), Reft(WIDTHS, 2)
    with pytest.raises(NonFiniteLoss, match="a parameter is not finite .*site: a"):
        train(start, loss, optimizer=made, steps=5, folder=tmp_path, save_every=1)
    assert not (tmp_path / "training.safetensors").exists()
    assert equal(Reft.load(tmp_path / "reft.safetensors"), Reft(WIDTHS, 2))


def test_adapters_for_steps_need_activations_with_steps():
    pairs = Pairs(made_up().base, made_up().teacher, None)
    with pytest.raises(InvalidInput, match="these sites have no steps: train adapters without"):
        train(Reft(WIDTHS, 2, steps=2), ActivationMatch(pairs), steps=1)
