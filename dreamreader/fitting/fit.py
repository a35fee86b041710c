"""The training loop: one for all that learns, exact to the bit when it is stopped and goes on."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch
from torch import nn

from dreamreader._files import lock_folder
from dreamreader._progress import Progress, show_progress
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting.batches import Batches, ByStep, stream_of
from dreamreader.fitting.learner import AroundStep, History, Learner
from dreamreader.fitting.objective import Function, Objective, Terms
from dreamreader.fitting.recipe import Recipe
from dreamreader.fitting.run import Run, Stateful, Validate, own_random

Goal = Objective | Callable[[Any, Any], Terms]


class Options(TypedDict, total=False):
    """What `fit` takes by name; see there."""

    validate: Validate | None
    before_step: AroundStep | Mapping[str, AroundStep] | None
    after_step: AroundStep | Mapping[str, AroundStep] | None
    state: Mapping[str, Stateful] | None
    of: Mapping[str, Any] | None
    save_every: int
    check_every: int | None


@overload
def fit(
    module: nn.Module,
    objective: Goal,
    batches: Batches,
    recipe: Recipe | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = True,
    **options: Unpack[Options],
) -> History: ...


@overload
def fit(
    module: Mapping[str, nn.Module],
    objective: Goal | Mapping[str, Goal],
    batches: Batches,
    recipe: Recipe | Mapping[str, Recipe] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = True,
    **options: Unpack[Options],
) -> dict[str, History]: ...


@torch.inference_mode(False)
def fit(
    module: Any,
    objective: Any,
    batches: Batches,
    recipe: Any = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = True,
    *,
    validate: Validate | None = None,
    before_step: AroundStep | Mapping[str, AroundStep] | None = None,
    after_step: AroundStep | Mapping[str, AroundStep] | None = None,
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
        progress: shown by default, or a function of a `ProgressEvent` (with the sum of losses) that
            is called after each step, or False.
        validate: gives the loss on what was held out, by name for several modules; a vector keeps
            the best of each slot, see `Best`. Called as the recipe's `validate_every` says.
        before_step: called as (module, steps done) between the gradients of a step and their
            clipping: for what changes gradients.
        after_step: called as (module, steps done) after each step of its optimiser, without
            gradients: for constraints of parameters, counters and averages.
        state: what else goes into the checkpoint, by name.
        of: plain values that tell this training from others, such as the data's name; needed with
            a folder where batches (a `DataLoader`, a function) do not tell their data themselves.
        save_every: steps between two writings of the checkpoint.
        check_every: steps between two looks at parameters and gradients, and copies of the last
            good state; None: at the loss alone, and without copies.

    Returns:
        The history, those of steps before a stop too; by name for several modules.

    Raises:
        NonFiniteLoss: a loss, gradient or parameter is not finite; names step, examples and part.
            The module is what it was at the last finite loss.
        InvalidInput, UnknownName: a value of the recipe cannot be right, there are no batches, or
            the folder is in use, holds another training, or could not tell it from one on other
            data.

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
    if len({id(each) for each in modules.values()}) < len(modules):
        raise InvalidInput("fit: a module stands under two names; it would be trained twice a step")
    recipes = _by_name("recipe", recipe or Recipe(), modules)
    goals = _by_name("objective", objective, modules)
    before = _by_name("before_step", before_step, modules)
    after = _by_name("after_step", after_step, modules)
    for name, each in recipes.items():
        _check_kind("module", modules[name], nn.Module, "a torch module, or several by name")
        _check_kind("recipe", each, Recipe, "a Recipe, or one for each module by name")
        if not isinstance(goals[name], Objective) and not callable(goals[name]):
            _check_kind("objective", goals[name], Objective, "a function, or an Objective")
        for what, hook in (("before_step", before[name]), ("after_step", after[name])):
            if hook is not None and not callable(hook):
                raise InvalidInput(f"fit: {what} is a function of (module, step), got {hook!r}")
    if validate is not None and not callable(validate):
        raise InvalidInput(f"fit: validate is a function that gives a loss, got {validate!r}")
    _check_kind("state", state, Mapping | None, "objects by name")
    _check_kind("of", of, Mapping | None, "plain values by name")
    _check_kind("folder", folder, str | os.PathLike | None, "the path of a folder, or None")
    for name, value in (("save_every", save_every), ("check_every", check_every)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and (value is not None or name == "save_every"):
            raise InvalidInput(f"fit: {name} is a number of steps, got {value!r}")
    _check_same(recipes)
    if validate is None and any(each.patience is not None for each in recipes.values()):
        raise InvalidInput("fit: patience needs validate")
    if save_every < 1 or (check_every is not None and check_every < 1):
        raise InvalidInput(
            f"fit: save_every and check_every must be at least 1, got {save_every}, {check_every}"
        )
    stream = stream_of(batches)
    common = next(iter(recipes.values()))
    if isinstance(batches, ByStep) and common.steps is None:
        raise InvalidInput("fit: batches by the step have no epochs: give steps=")
    if folder is not None and not of and not stream.is_identified:
        kind = getattr(batches, "__qualname__", None) or type(batches).__name__
        raise InvalidInput(
            f"fit: nothing tells the data of {kind} from others, so that the training could go on "
            "with other data: name them by of={'data': ...}, or give a list, a StoreDataset, or "
            "ByStep(function, of=...)"
        )
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
            before[name],
            after[name],
        )
        for name, each in modules.items()
    }
    path = None if folder is None else Path(folder)
    run = Run(learners, stream, common, total, path, validate, state or {}, of or {})
    with ExitStack() as stack:
        if path is not None:
            stack.enter_context(lock_folder(path))
        for each in {id(one.objective): one.objective for one in learners.values()}.values():
            stack.enter_context(each.ready())
        stack.enter_context(own_random(common.seed, run.devices))
        stack.callback(stream.close)
        run.resume()
        with show_progress(progress) as report:
            run.run(save_every, report)
    for each in learners.values():
        each.finish(run.done)
    histories = {name: each.history for name, each in learners.items()}
    return histories if several else histories[""]


def _by_name(what: str, given: Any, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each module, from one for all or one for each."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(modules, given)
    for name in given:
        if name not in modules:
            raise UnknownName(f"module in {what}", name, modules)
    lacking = [name for name in modules if name not in given]
    if lacking and not what.endswith("_step"):
        raise InvalidInput(f"fit: {what} lacks {', '.join(lacking)}")
    return {name: given.get(name) for name in modules}


def _check_kind(name: str, value: Any, kind: Any, words: str) -> None:
    if not isinstance(value, kind):
        raise InvalidInput(f"fit: {name} is {words}, got {type(value).__name__} {value!r:.60}")


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
