"""How adapters are trained: optimiser, rates, validation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft.model import Reft

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Recipe:
    """How adapters are trained; see `train`."""

    steps: int = 300
    optimizer: str | Callable[[Any], torch.optim.Optimizer] = "AdamW"
    lr: float = 1e-2
    weight_decay: float = 0.0
    batch_size: int = 16
    warmup: int = 0
    schedule: str = "cosine"
    grad_clip: float | None = None
    validation: float = 0.0
    validate_every: int = 25
    patience: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "validate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"train: {name} must be at least 1, got {value}")
        if not 0 <= self.validation < 1:
            raise InvalidInput(f"train: validation is a share from 0 to 1, got {self.validation}")
        if self.patience is not None and not self.validation:
            raise InvalidInput("train: patience needs a share of rows for validation")
        if self.schedule not in SCHEDULES:
            raise UnknownName("schedule", self.schedule, SCHEDULES)

    def share(self, step: int) -> float:
        """The learning rate of a step, as a share of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        fall = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return fall[self.schedule]

    def made(self, reft: Reft) -> torch.optim.Optimizer:
        parameters = list(reft.parameters())
        if not isinstance(self.optimizer, str):
            return self.optimizer(parameters)
        known = [name for name in dir(torch.optim) if _is_optimizer(name)]
        if self.optimizer not in known:
            raise UnknownName("optimizer", self.optimizer, known)
        decay = {"weight_decay": self.weight_decay} if self.weight_decay else {}
        if self.optimizer.startswith("AdamW"):
            decay = {"weight_decay": self.weight_decay}  # theirs is not 0 by default
        return getattr(torch.optim, self.optimizer)(parameters, lr=self.lr, **decay)

    def said(self) -> dict[str, Any]:
        """The recipe as JSON has it."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        chosen = self.optimizer if isinstance(self.optimizer, str) else "given"
        return own | {"optimizer": chosen}


def _is_optimizer(name: str) -> bool:
    kind = getattr(torch.optim, name)
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
