"""The training loop: one for all that learns, exact to the bit when it is stopped and goes on."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from torch import nn

from dreamreader._files import explained, locked
from dreamreader._hashing import class_of, hash_values
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting.batches import Batches, stream_of
from dreamreader.fitting.checkpoint import load_state, save_state
from dreamreader.fitting.learner import AfterStep, History, Learner
from dreamreader.fitting.objective import Function, Objective, Terms
from dreamreader.fitting.recipe import Recipe

CHECKPOINT = "training.safetensors"

Progress = Callable[[int, int | None, float], Any]
"""Called after each step with (steps done, steps in all where known, loss)."""

Goal = Objective | Callable[[Any, Any], Terms]
Validate = Callable[[], Any]


class Stateful(Protocol):
    """What a checkpoint keeps beside modules, such as an average of their weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@overload
def fit(
    module: nn.Module,
    objective: Goal,
    batches: Batches,
    recipe: Recipe | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> History: ...


@overload
def fit(
    module: Mapping[str, nn.Module],
    objective: Goal | Mapping[str, Goal],
    batches: Batches,
    recipe: Recipe | Mapping[str, Recipe] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, History]: ...


@torch.inference_mode(False)
def fit(
    module: Any,
    objective: Any,
    batches: Batches,
    recipe: Any = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    *,
    validate: Validate | None = None,
    after_step: AfterStep | Mapping[str, AfterStep] | None = None,
    state: Mapping[str, Stateful] | None = None,
    of: Mapping[str, Any] | None = None,
    save_every: int = 100,
    check_every: int | None = 1,
) -> Any:
    """Trains a module in place, or several in one pass over the batches.

    Modules of one pass learn as each would alone: every one has its own optimiser, gradients, best
    state and, if it is given, recipe and objective. Torch's own generator is the training's while
    it lasts: it starts from the recipe's seed, is kept in the checkpoint, and put back.

    Args:
        module: one, or several by name; they end as the best on validation, or the last without.
        objective: from (module, batch) to the loss, to parts of it by name, or to None, where the
            batch teaches this module nothing; or an `Objective`. By name, where they differ.
        batches: an iterable that is read once an epoch, such as a `StoreDataset` or a list; a
            function from the number of an epoch to an iterable; or `ByStep(function of the step)`.
        recipe: how, see `Recipe`; by name, where rates differ.
        folder: for `training.safetensors`, from which the same call goes on where it was stopped,
            in the middle of an epoch too, equal to the bit to a training that was not.
        progress: called after each step with (steps done, steps in all or None, sum of losses).
        validate: gives the loss on what was held out, by name for several modules; a vector keeps
            the best of each slot, see `Best`. Called as the recipe's `validate_every` says.
        after_step: called as (module, steps done) after each step of its optimiser, without
            gradients: for constraints of parameters, counters and averages.
        state: what else goes into the checkpoint, by name.
        of: plain values that tell this training from others, such as the data's name.
        save_every: steps between two writings of the checkpoint.
        check_every: steps between two looks at parameters and gradients, and copies of the last
            good state; None: at the loss alone, and without copies.

    Returns:
        The history, those of steps before a stop too; by name for several modules.

    Raises:
        NonFiniteLoss: a loss, gradient or parameter is not finite; names step, examples and part.
            The module is what it was at the last finite loss.
        InvalidInput, UnknownName: a value of the recipe cannot be right, there are no batches, or
            the folder is in use, or holds another training.

    Example:
        >>> layer, rows = torch.nn.Linear(4, 4), [torch.eye(4)]
        >>> def loss(layer, x):
        ...     return (layer(x) - x).square().mean()
        >>> history = fit(layer, loss, rows, Recipe(steps=100, lr=0.1))
        >>> history.losses[-1] < 0.1 * history.losses[0]
        True
    """
    several = isinstance(module, Mapping)
    modules: dict[str, nn.Module] = dict(module) if several else {"": module}
    if not modules:
        raise InvalidInput("fit: there are no modules")
    recipes = _by_name("recipe", recipe or Recipe(), modules)
    goals = _by_name("objective", objective, modules)
    hooks = _by_name("after_step", after_step, modules)
    _check_same(recipes)
    if validate is None and any(each.patience is not None for each in recipes.values()):
        raise InvalidInput("fit: patience needs validate")
    if save_every < 1 or (check_every is not None and check_every < 1):
        raise InvalidInput(
            f"fit: save_every and check_every must be at least 1, got {save_every}, {check_every}"
        )
    stream = stream_of(batches)
    common = next(iter(recipes.values()))
    total = _total(common, stream.length)
    for each in recipes.values():
        if total is None and each.schedule != "constant":
            raise InvalidInput(
                f"fit: the schedule {each.schedule} needs to know the steps: give steps=, batches "
                "with a length, or schedule='constant'"
            )
    learners = {
        name: Learner(
            name,
            each,
            goals[name] if isinstance(goals[name], Objective) else Function(goals[name]),
            recipes[name],
            total,
            check_every,
            validate is not None,
            hooks[name],
        )
        for name, each in modules.items()
    }
    path = None if folder is None else Path(folder)
    run = _Run(learners, stream, common, total, path, validate, state or {}, of or {})
    with ExitStack() as stack:
        if path is not None:
            stack.enter_context(locked(path))
        for each in {id(one.objective): one.objective for one in learners.values()}.values():
            stack.enter_context(each.ready())
        stack.enter_context(_own_random(common.seed, run.devices))
        stack.callback(stream.close)
        run.resume()
        run.run(save_every, progress)
    for each in learners.values():
        each.finish(run.done)
    histories = {name: each.history for name, each in learners.items()}
    return histories if several else histories[""]


class _Run:
    """A training on its way."""

    def __init__(
        self,
        learners: dict[str, Learner],
        stream: Any,
        recipe: Recipe,
        total: int | None,
        folder: Path | None,
        validate: Validate | None,
        state: Mapping[str, Stateful],
        of: Mapping[str, Any],
    ):
        self.learners, self.stream, self.recipe, self.total = learners, stream, recipe, total
        self.folder, self.held_out, self.state, self.of = folder, validate, state, of
        self.done = 0
        self.waited = 0  # validations since a better one of any module
        self.stopped = False
        self._identity: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        recipe = self.recipe
        ended = recipe.steps is not None and self.done >= recipe.steps
        read = recipe.epochs is not None and self.stream.epoch >= recipe.epochs
        return ended or read or self.stopped

    @property
    def devices(self) -> list[torch.device]:
        """GPUs on which modules are."""
        used = {p.device for each in self.learners.values() for p in each.parameters}
        return sorted((each for each in used if each.type == "cuda"), key=str)

    def run(self, save_every: int, progress: Progress | None) -> None:
        while not self.over:
            taken = self.stream.take()
            if taken is None:
                self._end_epoch()
                continue
            found = [each.step(taken[0], self.done) for each in self.learners.values()]
            self.done += 1
            every = self.recipe.validate_every
            if self.over or (every and (self.done % every == 0 or self.done == self.total)):
                self._validate()
            if self.folder is not None and (self.done % save_every == 0 or self.over):
                self.save()
            if progress is not None:
                value = sum(each for each in found if each is not None)
                progress(self.done, self.total, value)

    def _end_epoch(self) -> None:
        if self.recipe.validate_every is None or self.over:
            self._validate()
        if self.folder is not None and self.over:
            self.save()

    def _validate(self) -> None:
        """Once for each state, where there is anything to validate on."""
        validated = next(iter(self.learners.values())).history.validation
        if self.held_out is None or (validated and validated[-1][0] == self.done):
            return
        with torch.no_grad():
            found = self.held_out()
        losses = found if isinstance(found, Mapping) else {"": found}
        if set(losses) != set(self.learners):
            raise InvalidInput(
                f"fit: validate gives losses of {list(losses)}, the modules are "
                f"{list(self.learners)}"
            )
        better = [each.offer(self.done, losses[name]) for name, each in self.learners.items()]
        self.waited = 0 if any(better) else self.waited + 1
        patience = self.recipe.patience
        self.stopped = not self.over and patience is not None and self.waited >= patience
        for each in self.learners.values():
            each.history.stopped = self.stopped

    def save(self) -> None:
        assert self.folder is not None
        for each in self.learners.values():
            each.check(self.done)  # what goes on must be a good state
        cuda = [torch.cuda.get_rng_state(each) for each in self.devices]
        content = {
            "of": self._of(),
            "done": self.done,
            "waited": self.waited,
            "stopped": self.stopped,
            "batches": self.stream.state_dict(),
            "modules": {name: each.state_dict() for name, each in self.learners.items()},
            "state": {name: each.state_dict() for name, each in self.state.items()},
            "random": [torch.get_rng_state(), *cuda],
        }
        with explained(self.folder):
            save_state(self.folder / CHECKPOINT, content)

    def resume(self) -> None:
        """Goes on from the folder, where there is a training."""
        if self.folder is None or not (self.folder / CHECKPOINT).is_file():
            return
        found = load_state(self.folder / CHECKPOINT)
        had, now = found["of"], self._of()
        for name in (*now, *(each for each in had if each not in now)):
            if had.get(name) != now.get(name):
                raise InvalidInput(
                    f"{self.folder} holds a training with {name}={had.get(name)!r}, not "
                    f"{now.get(name)!r}; use another folder"
                )
        self.done, self.waited, self.stopped = found["done"], found["waited"], found["stopped"]
        for name, each in self.learners.items():
            each.load_state_dict(found["modules"][name])
        for name, each in self.state.items():
            each.load_state_dict(found["state"][name])
        self.stream.load_state_dict(found["batches"])
        cpu, *cuda = found["random"]
        torch.set_rng_state(cpu)
        for device, own in zip(self.devices, cuda, strict=False):
            torch.cuda.set_rng_state(own, device)

    def _of(self) -> dict[str, Any]:
        """What a training that goes on shares with the one that was stopped."""
        if self._identity is None:
            found: dict[str, Any] = {}
            for name, each in self.learners.items():
                before = f"{name}: " if name else ""
                found |= {f"{before}{key}": own for key, own in each.recipe.describe().items()}
            found |= self.of
            found |= {"batches": self.stream.identity(), "state": list(self.state)}
            for name, each in self.learners.items():
                found |= _shapes(f"{name}: " if name else "", each)
            self._identity = found
        return self._identity


def _shapes(before: str, learner: Learner) -> dict[str, Any]:
    """Class, shapes and loss of a module."""
    module, goal = learner.module, learner.objective
    what = goal.function if isinstance(goal, Function) else goal
    name = getattr(what, "__qualname__", type(what).__name__)
    found = {"module": class_of(module)}
    for kind in ("parameters", "buffers"):
        for key, each in getattr(module, f"named_{kind}")():
            found[f"{kind[:-1]} {key}"] = f"{list(each.shape)} {each.dtype}"
    found["loss and its data"] = f"{name} {hash_values(what)[:16]}"
    return {f"{before}{key}": each for key, each in found.items()}


def _by_name(what: str, given: Any, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each module, from one for all or one for each."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(modules, given)
    for name in given:
        if name not in modules:
            raise UnknownName(f"module in {what}", name, modules)
    lacking = [name for name in modules if name not in given]
    if lacking and what != "after_step":
        raise InvalidInput(f"fit: {what} lacks {', '.join(lacking)}")
    return {name: given.get(name) for name in modules}


def _check_same(recipes: Mapping[str, Recipe]) -> None:
    """Refuses recipes of one pass that end or validate at different steps."""
    for field in ("steps", "epochs", "validate_every", "patience"):
        found = {name: getattr(each, field) for name, each in recipes.items()}
        if len(set(found.values())) > 1:
            raise InvalidInput(f"fit: modules of one pass have the same {field}, got {found}")


def _total(recipe: Recipe, length: int | None) -> int | None:
    """Steps in all, where they are known."""
    read = None if recipe.epochs is None or length is None else recipe.epochs * length
    if recipe.epochs is not None and read is None and recipe.schedule == "constant":
        return None
    return min((each for each in (recipe.steps, read) if each is not None), default=None)


@contextmanager
def _own_random(seed: int, devices: list[torch.device]) -> Iterator[None]:
    """Torch's generators, begun from a seed and put back in the end."""
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
