"""The training loop: batches, resume, checks, validation, and what cannot be right."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import Best, ByStep, NonFiniteLoss, Objective, Recipe, fit


class Stop(Exception):
    pass


def layer(seed: int = 0, width: int = 3) -> nn.Linear:
    made = nn.Linear(width, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in made.parameters():
            each.copy_(torch.randn(each.shape, generator=generator))
    return made


def error(module: nn.Module, x: Tensor) -> Tensor:
    return (module(x) - x).square().mean()


def rows(count: int = 5, seed: int = 9) -> list[Tensor]:
    return list(torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(seed)))


def drawn(epoch: int) -> list[Tensor]:
    return rows(5, epoch)


def stop_at(step: int) -> Any:
    def progress(event: Any) -> None:
        if event.done == step:
            raise Stop

    return progress


def loader() -> DataLoader[Any]:
    return DataLoader(rows(5), batch_size=None, shuffle=True)  # pyright: ignore


@pytest.mark.parametrize(
    "batches",
    [rows(), drawn, ByStep(lambda step: rows(1, step)[0]), loader()],
    ids=["list", "function of the epoch", "function of the step", "loader"],
)
@pytest.mark.parametrize("at", [7, 10])
def test_every_kind_of_batches_goes_on_to_the_same_bits(tmp_path: Path, batches: Any, at: int):
    recipe = Recipe(steps=17, lr=0.1)
    of = {"data": "rows of this test"}
    with pytest.raises(Stop):
        fit(layer(), error, batches, recipe, tmp_path, stop_at(at), save_every=1, of=of)
    again, whole = layer(1), layer()
    steps: list[float] = []
    follow = lambda event: steps.append(event.done)  # noqa: E731
    found = fit(again, error, batches, recipe, tmp_path, follow, of=of)
    wanted = fit(whole, error, batches, recipe)
    assert found == wanted and len(found.losses) == 17 and steps[0] == at + 1
    assert torch.equal(again.weight, whole.weight) and not torch.equal(again.weight, layer().weight)


def test_dropout_goes_on_to_the_same_bits_and_leaves_the_generator_as_it_was(tmp_path: Path):
    def made() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), layer())

    recipe = Recipe(steps=12, seed=3)
    torch.manual_seed(77)
    whole = made()
    before = torch.get_rng_state()
    fit(whole, error, rows(), recipe)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    with pytest.raises(Stop):
        fit(made(), error, rows(), recipe, tmp_path, stop_at(8), save_every=3)
    again = made()
    fit(again, error, rows(), recipe, tmp_path)
    assert torch.equal(again[1].weight, whole[1].weight)  # pyright: ignore


@pytest.mark.parametrize(
    ("batches", "name"),
    [(drawn, "drawn"), (loader(), "DataLoader"), (ByStep(lambda step: rows()[0]), "ByStep")],
    ids=["function of the epoch", "loader", "function of the step"],
)
def test_a_folder_needs_batches_that_tell_their_data(tmp_path: Path, batches: Any, name: str):
    text = f"nothing tells the data of {name} from others, .*: name them by of="
    with pytest.raises(InvalidInput, match=text):
        fit(layer(), error, batches, Recipe(steps=2), tmp_path)
    assert not list(tmp_path.iterdir())
    fit(layer(), error, batches, Recipe(steps=2), tmp_path, of={"data": "mine"})
    with pytest.raises(InvalidInput, match="holds a training with data='mine', not 'yours'"):
        fit(layer(), error, batches, Recipe(steps=2), tmp_path, of={"data": "yours"})


def dropping(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Sequential(nn.Dropout(0.5), layer()) for name in names}


def test_modules_of_one_pass_draw_from_generators_of_their_own(tmp_path: Path):
    recipe, both = Recipe(steps=9, lr=0.1, seed=3), dropping("a", "b")
    histories = fit(both, error, rows(), recipe)
    assert histories["a"].losses != histories["b"].losses
    for name, module in both.items():
        alone = dropping(name)
        assert fit(alone, error, rows(), recipe)[name] == histories[name]
        assert torch.equal(alone[name][1].weight, module[1].weight)  # pyright: ignore
    with pytest.raises(Stop):
        fit(dropping("a", "b"), error, rows(), recipe, tmp_path, stop_at(5), save_every=2)
    again = dropping("a", "b")
    assert fit(again, error, rows(), recipe, tmp_path) == histories
    for name, module in both.items():
        assert torch.equal(again[name][1].weight, module[1].weight)  # pyright: ignore


def test_a_training_goes_on_in_the_mode_it_had(tmp_path: Path):
    fit(dropping("a"), error, rows(), Recipe(steps=2), tmp_path)
    other = dropping("a")
    other["a"].eval()
    text = "holds a training with a: mode='train', not 'eval'"
    with pytest.raises(InvalidInput, match=text):
        fit(other, error, rows(), Recipe(steps=2), tmp_path)
    other["a"].train()[0].eval()  # pyright: ignore
    with pytest.raises(InvalidInput, match="a: mode='train', not 'train, 0: eval'"):
        fit(other, error, rows(), Recipe(steps=2), tmp_path)


def test_what_a_checkpoint_keeps_beside_modules(tmp_path: Path):
    class Average:
        def __init__(self) -> None:
            self.value = torch.zeros(3, 3)

        def update(self, module: nn.Module, done: int) -> None:
            assert isinstance(module, nn.Linear)
            self.value.lerp_(module.weight, 1 / done)

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    def run(folder: Path | None, progress: Any = False) -> Tensor:
        average = Average()
        given: Any = {"after_step": average.update, "state": {"average": average}}
        fit(layer(), error, rows(), Recipe(steps=9), folder, progress, save_every=2, **given)
        return average.value

    with pytest.raises(Stop):
        run(tmp_path, stop_at(5))
    assert torch.equal(run(tmp_path), run(None))


def test_validation_keeps_parameters_and_buffers_of_the_best(tmp_path: Path):
    module = layer()
    module.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    values = iter([math.nan, 5.0, 2.0, 3.0, math.inf, 9.0])

    def count(module: Any, done: int) -> None:
        module.seen.fill_(done)

    recipe = Recipe(epochs=9, schedule="constant", validate_every=None, patience=3)
    given: Any = {"validate": lambda: next(values), "after_step": count, "save_every": 5}
    history = fit(module, error, rows(), recipe, tmp_path, **given)
    assert history.validation == [(5, math.inf), (10, 5.0), (15, 2.0), (20, 3.0), (25, math.inf),
                                  (30, 9.0)]  # fmt: skip
    assert history.stopped and history.best == 15 and len(history.losses) == 30
    assert int(module.seen) == 15  # pyright: ignore
    other = layer()
    other.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    assert fit(other, error, rows(), recipe, tmp_path, **given) == history  # nothing is left to do
    assert torch.equal(other.weight, module.weight) and int(other.seen) == 15  # pyright: ignore


def test_validation_comes_after_so_many_steps_and_at_the_end():
    for recipe in (Recipe(steps=7, validate_every=3), Recipe(epochs=2, validate_every=3)):
        batches = rows(5 if recipe.steps else 4)
        history = fit(layer(), error, batches, recipe, validate=lambda: 1.0)
        assert [step for step, _ in history.validation] == [3, 6, len(history.losses)]
        assert history.best == 3 and not history.stopped


def test_slots_have_a_best_state_each():
    class Slots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 1))

    module = Slots()
    losses = iter(torch.tensor([[3.0, 1.0], [2.0, 2.0], [4.0, 0.5]]))
    states: list[Tensor] = []

    def validate() -> Tensor:
        states.append(module.w.detach().clone())
        return next(losses)

    recipe = Recipe(steps=3, validate_every=1, optimizer="SGD")
    history = fit(module, lambda m, x: m.w.sum(), rows(), recipe, validate=validate)
    assert history.slots == (2, 3) and history.best == 3
    assert module.w.flatten().tolist() == [float(states[1][0]), float(states[2][1])]
    assert Best(module).losses is None


def test_a_batch_may_teach_a_module_nothing():
    def even(module: nn.Module, batch: tuple[int, Tensor]) -> Tensor | None:
        return error(module, batch[1]) if batch[0] % 2 == 0 else None

    def odd(module: nn.Module, batch: tuple[int, Tensor]) -> Tensor | None:
        return error(module, batch[1]) if batch[0] % 2 else None

    modules = {"even": layer(), "odd": layer()}
    recipe = Recipe(epochs=1, schedule="constant", optimizer="SGD", lr=0.1)
    found = fit(modules, {"even": even, "odd": odd}, list(enumerate(rows())), recipe)
    assert [len(found[name].losses) for name in modules] == [3, 2]
    alone = layer()
    fit(alone, error, rows()[1::2], recipe)
    assert torch.equal(alone.weight, modules["odd"].weight)


def test_what_is_not_finite_is_named_and_the_last_good_state_put_back():
    batches = rows()
    batches[3][1, 2] = math.inf
    modules = {"a": layer(), "b": layer(1)}
    with pytest.raises(NonFiniteLoss, match="^a: step 3: the loss is (inf|nan); part: none. A sm"):
        fit(modules, error, batches, Recipe(epochs=1, schedule="constant"))
    good = layer()
    fit(good, error, batches[:2], Recipe(epochs=1, schedule="constant"))
    assert torch.equal(modules["a"].weight, good.weight)  # of the last finite loss

    class Root(Objective):
        part_name = "tensor"

        def terms(self, module: Any, batch: Tensor) -> dict[str, Tensor]:
            return {"root": (module.weight * 0).sum().sqrt(), "error": error(module, batch)}

        def describe(self, batch: Tensor) -> str:
            return f"{len(batch)} rows"

    start = layer()
    text = r"step 0: a gradient is not finite on 4 rows; tensor: weight\. .*last good state$"
    with pytest.raises(NonFiniteLoss, match=text):
        fit(start, Root(), rows(), Recipe(steps=3))
    assert torch.equal(start.weight, layer().weight)


def test_a_checkpoint_that_is_damaged_is_refused(tmp_path: Path):
    fit(layer(), error, rows(), Recipe(steps=3), tmp_path)
    path = tmp_path / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match="training.safetensors is damaged"):
        fit(layer(), error, rows(), Recipe(steps=3), tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"recipe": Recipe(steps=4, seed=1)}, "seed=0, not 1"),
        ({"recipe": Recipe(steps=4, optimizer={"Adam": {"eps": 1e-3}})}, "optimizer='AdamW', not"),
        ({"batches": rows(4)}, "batches='"),
        ({"objective": lambda module, x: error(module, x)}, "loss and its data='error"),
        ({"module": layer(width=4)}, r"parameter weight='\[3, 3\] torch.float32', not '\[4, 4\]"),
        ({"of": {"data": "other"}}, "data='mine', not 'other'"),
        ({"validate": lambda: 1.0}, "validated=False, not True"),
        ({"after_step": lambda module, done: None}, "after_step=None, not '"),
    ],
    ids=["seed", "optimizer", "batches", "objective", "shape", "of", "validate", "hook"],
)
def test_a_folder_goes_on_with_the_same_training_only(tmp_path: Path, change: Any, text: str):
    given = {"module": layer(), "objective": error, "batches": rows(), "recipe": Recipe(steps=4)}
    given |= {"folder": tmp_path, "of": {"data": "mine"}}
    fit(**given)
    with pytest.raises(InvalidInput, match=f"{tmp_path} holds a training with {text}"):
        fit(**given | change)


def test_a_function_that_gives_another_optimizer_is_told(tmp_path: Path):
    def run(parameters: Any) -> None:
        recipe = Recipe(steps=2, optimizer=lambda given: torch.optim.SGD(parameters(given)))
        fit(layer(), error, rows(), recipe, tmp_path)

    run(lambda given: given)
    with pytest.raises(InvalidInput, match="fit: the checkpoint is of another optimizer: .*group"):
        run(lambda given: given[:1])


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        (
            {"batches": ByStep(lambda step: rows()[0]), "recipe": Recipe(epochs=2)},
            InvalidInput,
            "batches by the step have no epochs: give steps=",
        ),
        ({"batches": iter(rows())}, InvalidInput, "can be read only once; give a list"),
        ({"batches": 3}, InvalidInput, "batches are an iterable, a function .*, got int"),
        ({"batches": []}, InvalidInput, "there are no batches in epoch 0"),
        ({"module": {}}, InvalidInput, "there are no modules"),
        ({"module": nn.ReLU()}, InvalidInput, "there are no parameters to train"),
        ({"recipe": Recipe(steps=3, patience=2)}, InvalidInput, "patience needs validate"),
        ({"batches": drawn, "recipe": Recipe(epochs=2)}, InvalidInput, "cosine needs to know the"),
        ({"save_every": 0}, InvalidInput, "save_every and check_every must be at least 1, got 0"),
        ({"module": {"a": layer()}, "objective": {"b": error}}, UnknownName, "module in objective"),
        (
            {"module": {"a": layer(), "b": layer()}, "objective": {"b": error}},
            InvalidInput,
            "objective lacks a",
        ),
        (
            {
                "module": {"a": layer(), "b": layer()},
                "recipe": {"a": Recipe(steps=2), "b": Recipe(steps=3)},
            },
            InvalidInput,
            "the same steps, got {'a': 2, 'b': 3}",
        ),
        (
            {"module": {"a": layer()}, "validate": lambda: 1.0},
            InvalidInput,
            r"losses of \[''\], the modules are \['a'\]",
        ),
    ],
)
def test_wrong_inputs_say_what_is_wrong(given: dict[str, Any], kind: type[Exception], text: str):
    usual: dict[str, Any] = {"module": layer(), "objective": error, "batches": rows()}
    with pytest.raises(kind, match=text):
        fit(**usual | {"recipe": Recipe(steps=3)} | given)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"lr": 0.0}, InvalidInput, "lr must be positive, got 0.0"),
        ({"epochs": 0}, InvalidInput, "epochs must be at least 1, got 0"),
        ({"schedule": "wds"}, UnknownName, "unknown schedule 'wds'; nearest: wsd"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(given: dict[str, Any], kind: type[Exception], text: str):
    with pytest.raises(kind, match=text):
        Recipe(**given)


def test_recipes_without_a_length_have_the_usual_one():
    assert Recipe().steps == 300 and Recipe(epochs=2).steps is None


def test_options_reach_the_optimizer():
    recipe = Recipe(optimizer={"SGD": {"momentum": 0.9}}, lr=0.25, weight_decay=0.5)
    made = recipe.build_optimizer(layer().parameters())
    group = made.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.9, 0.5)
    with pytest.raises(InvalidInput, match="train: optimizer SGD: .*'mass'"):
        Recipe(optimizer={"SGD": {"mass": 1}}).build_optimizer(layer().parameters())
    with pytest.raises(InvalidInput, match="a name, or one name with options"):
        Recipe(optimizer={}).build_optimizer(layer().parameters())
