"""A training on its way: steps, validation, and the checkpoint from which it goes on."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from dreamreader._files import explain_disk_errors
from dreamreader._hashing import class_of, hash_values
from dreamreader._progress import ProgressCallback, ProgressEvent, silent
from dreamreader.errors import InvalidInput
from dreamreader.fitting.batches import Stream
from dreamreader.fitting.checkpoint import TrainingState
from dreamreader.fitting.learner import Learner
from dreamreader.fitting.objective import Function
from dreamreader.fitting.recipe import Recipe

CHECKPOINT = "training.safetensors"

Validate = Callable[[], Any]


class Stateful(Protocol):
    """What a checkpoint keeps beside modules, such as an average of their weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Run:
    """A training on its way."""

    def __init__(
        self,
        learners: dict[str, Learner],
        stream: Stream,
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
        # one alone has torch's own generator
        self.generators = {
            name: _begin_generator(recipe.seed, name, self.devices) for name in learners if name
        }

    @property
    def over(self) -> bool:
        recipe = self.recipe
        ended = recipe.steps is not None and self.done >= recipe.steps
        read = recipe.epochs is not None and self.stream.epoch >= recipe.epochs
        return ended or read or self.stopped

    @cached_property
    def devices(self) -> list[torch.device]:
        """GPUs on which modules are."""
        used = {p.device for each in self.learners.values() for p in each.parameters}
        return sorted((each for each in used if each.type == "cuda"), key=str)

    def run(self, save_every: int, report: ProgressCallback) -> None:
        while not self.over:
            taken = self.stream.take()
            if taken is None:
                self._end_epoch()
                continue
            found = [self._step(name, taken[0]) for name in self.learners]
            self.done += 1
            every = self.recipe.validate_every
            if self.over or (every and self.done % every == 0):
                self._validate()
            if self.folder is not None and (self.done % save_every == 0 or self.over):
                self.save()
            if report is not silent:
                value = float(sum(each for each in found if each is not None))
                numbers = {"loss": value} | self._metrics()
                note = ", ".join(f"{name} {each:.4g}" for name, each in list(numbers.items())[:4])
                report(ProgressEvent("training", self.done, self.total, numbers, note))

    def _metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, each in self.learners.items():
            before = f"{name}: " if name else ""
            own = each.objective.metrics(each.module)
            found |= {f"{before}{key}": value for key, value in own.items()}
        return found

    def _step(self, name: str, batch: Any) -> float | None:
        """A step of one module, which draws from the module's own generator."""
        if name not in self.generators:
            return self.learners[name].step(batch, self.done)
        shared = _random_state(self.devices)
        _set_random_state(self.generators[name], self.devices)
        try:
            return self.learners[name].step(batch, self.done)
        finally:
            self.generators[name] = _random_state(self.devices)
            _set_random_state(shared, self.devices)

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
        content = {
            "of": self._of(),
            "done": self.done,
            "waited": self.waited,
            "stopped": self.stopped,
            "batches": self.stream.state_dict(),
            "modules": {name: each.state_dict() for name, each in self.learners.items()},
            "state": {name: each.state_dict() for name, each in self.state.items()},
            "random": _random_state(self.devices),
            "generators": self.generators,
        }
        with explain_disk_errors(self.folder):
            TrainingState(content).save(self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Goes on from the folder, where there is a training."""
        if self.folder is None:
            return
        now = self._of()  # before the first step, as an objective may change
        if not (self.folder / CHECKPOINT).is_file():
            return
        found = TrainingState.load(self.folder / CHECKPOINT)
        had = found["of"]
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
        _set_random_state(found["random"], self.devices)
        self.generators = {name: list(each) for name, each in found["generators"].items()}

    def _of(self) -> dict[str, Any]:
        """What a training that goes on shares with the one that was stopped."""
        if self._identity is None:
            found: dict[str, Any] = {}
            for name, each in self.learners.items():
                before = f"{name}: " if name else ""
                found |= {f"{before}{key}": own for key, own in each.recipe.describe().items()}
            found |= self.of
            found |= {"batches": self.stream.identity(), "state": list(self.state)}
            found["validated"] = self.held_out is not None
            for name, each in self.learners.items():
                found |= _shapes(f"{name}: " if name else "", each)
            self._identity = found
        return self._identity


def _shapes(before: str, learner: Learner) -> dict[str, Any]:
    """Class, shapes and loss of a module."""
    module, goal = learner.module, learner.objective
    what = goal.function if isinstance(goal, Function) else goal
    name = getattr(what, "__qualname__", type(what).__name__)
    found: dict[str, Any] = {"module": class_of(module)}
    modes = {key: "train" if each.training else "eval" for key, each in module.named_modules()}
    whole = modes[""]
    found["mode"] = whole + "".join(f", {k}: {v}" for k, v in modes.items() if v != whole)
    for kind in ("parameters", "buffers"):
        for key, each in getattr(module, f"named_{kind}")():
            found[f"{kind[:-1]} {key}"] = f"{list(each.shape)} {each.dtype}"
    for at in ("before_step", "after_step"):
        hook = getattr(learner, at)
        named = None if hook is None else getattr(hook, "__qualname__", class_of(hook))
        found[at] = named
    found["loss and its data"] = f"{name} {hash_values(what)[:16]}"
    return {f"{before}{key}": each for key, each in found.items()}


def _begin_generator(seed: int, name: str, devices: list[torch.device]) -> list[torch.Tensor]:
    """The state of the generators of a module among several, which its name seeds too."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    with own_random(int.from_bytes(digest[:7], "big"), devices):
        return _random_state(devices)


def _random_state(devices: list[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in devices)]


def _set_random_state(state: list[torch.Tensor], devices: list[torch.device]) -> None:
    torch.set_rng_state(state[0])
    for device, own in zip(devices, state[1:], strict=False):
        torch.cuda.set_rng_state(own, device)


@contextmanager
def own_random(seed: int, devices: list[torch.device]) -> Iterator[None]:
    """Torch's generators, begun from a seed and put back in the end."""
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
