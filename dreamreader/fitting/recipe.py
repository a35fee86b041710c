"""How modules are trained: optimiser, rates, how long, when it is validated."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreamreader.errors import InvalidInput, UnknownName

SCHEDULES = ("cosine", "linear", "constant", "wsd")
_STEPS = 300  # where neither steps nor epochs are said

Optimizer = str | Mapping[str, Mapping[str, Any]] | Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Recipe:
    """How modules are trained; `fit` and the trainings of methods read it.

    Attributes:
        steps: of the optimiser; 300 where `epochs` says nothing either. epochs: passes over the
            batches. The first that is reached ends the training.
        optimizer: a name of torch.optim, {name: {option: value}}, or a function from parameters to
            an optimiser, whose own rates take the place of `lr` and `weight_decay`.
        lr: the learning rate. weight_decay: of the optimiser.
        batch_size: where batches are drawn from a table of examples.
        warmup: steps in which the rate rises.
        schedule: of the rate after that: `cosine` and `linear` fall to 0, `constant` stays, `wsd`
            stays and falls at the end to 0.
        decay: share of the steps in which `wsd` falls.
        grad_clip: the largest norm of all gradients of a module.
        validation: share of examples that are held out, where the method holds them out.
        validate_every: steps between two validations; None: at the end of each epoch.
        patience: validations without a better one, after which it ends.
        seed: of the order of examples, and of what draws from torch's own generator.

    Raises:
        InvalidInput, UnknownName: a value cannot be right.
    """

    steps: int | None = None
    epochs: int | None = None
    optimizer: Optimizer = "AdamW"
    lr: float = 1e-2
    weight_decay: float = 0.0
    batch_size: int = 16
    warmup: int = 0
    schedule: str = "cosine"
    decay: float = 0.25
    grad_clip: float | None = None
    validation: float = 0.0
    validate_every: int | None = 25
    patience: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", _STEPS)
        for name in ("steps", "epochs", "batch_size", "validate_every", "patience"):
            _check_count(name, getattr(self, name), 1)
        _check_count("warmup", self.warmup, 0)
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and value > 0) and (value is not None or name == "lr"):
                raise InvalidInput(f"train: {name} must be positive, got {value!r}")
        for name in ("validation", "weight_decay", "seed"):
            value = getattr(self, name)
            kind = int if name == "seed" else int | float
            if isinstance(value, bool) or not isinstance(value, kind):
                raise InvalidInput(f"train: {name} is a number, got {value!r}")
        if not isinstance(self.optimizer, str | Mapping) and not callable(self.optimizer):
            raise InvalidInput(
                "train: optimizer is a name, {name: options} or a function, got "
                f"{self.optimizer!r}"
            )
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            raise InvalidInput(f"train: decay is a number, got {self.decay!r}")
        if not 0 < self.decay <= 1:
            raise InvalidInput(f"train: decay is a share above 0, at most 1, got {self.decay}")
        if not 0 <= self.validation < 1:
            raise InvalidInput(f"train: validation is a share from 0 to 1, got {self.validation}")
        if self.schedule not in SCHEDULES:
            raise UnknownName("schedule", str(self.schedule), SCHEDULES)

    def rate(self, lr: float, step: int, total: int | None) -> float:
        """The learning rate of a step.

        Args:
            lr: the highest. step: from 0. total: steps in all; a constant rate needs none.
        """
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        if self.schedule == "constant":
            return lr * rise
        assert total is not None
        if self.schedule == "wsd":
            return lr * rise * min(1.0, (total - step) / (self.decay * total))
        if step < self.warmup:
            return lr * rise
        done = (step - self.warmup) / max(1, total - self.warmup)
        return lr * (1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)

    def share(self, step: int) -> float:
        """The learning rate of a step, as a share of `lr`."""
        return self.rate(1.0, step, self.steps)

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of some parameters.

        Raises:
            UnknownName: torch has none of this name.
            InvalidInput: it takes no such option or value.
        """
        chosen, own = self.optimizer, list(parameters)
        if callable(chosen):
            return chosen(own)
        if not isinstance(chosen, str) and len(chosen) != 1:
            raise InvalidInput(
                f"train: optimizer is a name, or one name with options, got {list(chosen)}"
            )
        name, options = (chosen, {}) if isinstance(chosen, str) else next(iter(chosen.items()))
        known = optimizers()
        if name not in known:
            raise UnknownName("optimizer", name, known)
        decay = {"weight_decay": self.weight_decay}
        if not self.weight_decay and not name.startswith("AdamW"):  # theirs is not 0 by default
            decay = {}
        try:
            return known[name](own, **{"lr": self.lr, **decay, **options})
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"train: optimizer {name}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """The recipe as plain values; a function is `given`."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        chosen = "given" if callable(self.optimizer) else self.optimizer
        return own | {"optimizer": chosen}


def _check_count(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"train: {name} must be at least {least}, got {value!r}")


def optimizers() -> dict[str, Any]:
    """The optimisers of torch, by name."""
    kinds = {name: each for name, each in vars(torch.optim).items() if isinstance(each, type)}
    return {name: each for name, each in kinds.items() if issubclass(each, torch.optim.Optimizer)}
