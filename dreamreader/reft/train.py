"""Training adapters: batches are a function of the seed and the step, so a stop changes nothing."""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamreader._files import locked
from dreamreader._hashing import hash_values
from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.reft.batches import Batches
from dreamreader.reft.checkpoint import load_state, save_state
from dreamreader.reft.losses import Batch, Loss
from dreamreader.reft.model import Reft
from dreamreader.reft.recipe import Recipe

Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss)."""


class NonFiniteLoss(DreamreaderError, FloatingPointError):
    """The loss is no number any more; the adapters are in the last good state."""


@dataclass
class History:
    """How a training went.

    Attributes:
        losses: of each step. validation: (steps done, loss on what was held out).
        best: steps done where the kept adapters come from. stopped: before the last step.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    stopped: bool = False


def train(
    reft: Reft,
    loss: Loss,
    *,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: Progress | None = None,
    **recipe: Any,
) -> History:
    """Trains adapters in place.

    Args:
        reft: the adapters; they end as the best on validation, or the last without validation.
        loss: what is minimised.
        folder: for `training.safetensors`, from which the same call goes on where it was stopped,
            equal to the bit to a training that was not, and `reft.safetensors`, the result.
        save_every: steps between two writings of the former.
        progress: called after each step.
        recipe: `steps`; `optimizer`, a name of torch.optim or a function from parameters to one;
            `lr`; `weight_decay`; `batch_size`; `warmup` steps; `schedule`, `cosine`, `linear` or
            `constant`; `grad_clip`, the largest norm of all gradients; `validation`, the share of
            rows held out; `validate_every` steps; `patience`, validations without a better one
            before the end; `seed`.

    Returns:
        Losses of all steps, those before a stop too.

    Raises:
        NonFiniteLoss: the loss or a parameter is not finite; names step, rows and site. The
            adapters are what they were at the last finite loss, on disk too.
        InvalidInput, UnknownName: a value of the recipe cannot be right, or the folder holds a
            training with another recipe, of other adapters, or on other data, or is in use.

    Example:
        >>> history = train(reft, ActivationMatch(pairs), steps=300)     # doctest: +SKIP
    """
    run = _Run(reft, loss, Recipe(**recipe), Path(folder) if folder is not None else None)
    with nullcontext() if run.folder is None else locked(run.folder), loss.ready():
        run.resume()
        while not run.over:
            value = run.step()
            run.validate()
            if run.folder is not None and (run.done % save_every == 0 or run.over):
                run.save()
            if progress is not None:
                progress(run.done, run.recipe.steps, value)
    run.finish()
    return run.history


class _Run:
    """A training on its way."""

    def __init__(self, reft: Reft, loss: Loss, recipe: Recipe, folder: Path | None):
        self.reft, self.loss, self.recipe, self.folder = reft, loss, recipe, folder
        self.batches = Batches(loss, recipe.batch_size, recipe.validation, recipe.seed)
        self.optimizer = recipe.made(reft)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history = History()
        self.done = 0
        self.waited = 0
        self.good = self._parameters()
        self.best = self.good

    @property
    def over(self) -> bool:
        return self.done >= self.recipe.steps or self.history.stopped

    def step(self) -> float:
        """One step of the optimiser; its loss."""
        batch = self.batches[self.done]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.recipe.share(self.done)
        values: list[float] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            self._check_parameters(batch)
            total = torch.stack(list(self.loss.terms(self.reft, batch).values())).sum()
            value = float(total.detach())
            if not math.isfinite(value):
                self._fail(batch, f"the loss is {value}", self.loss.culprit(self.reft, batch))
            self.good = self._parameters() if not values else self.good
            total.backward()
            self._check_gradients(batch)
            values.append(value)
            return total

        self.optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self.done += 1
        self.history.losses.append(values[0])
        return values[0]

    def validate(self) -> None:
        """Where it is time: the loss on held-out rows; keeps the best and counts those without."""
        recipe, history = self.recipe, self.history
        due = self.done % recipe.validate_every == 0 or self.done == recipe.steps
        if not recipe.validation or not due:
            return
        value = self.batches.validation(self.reft)
        if not math.isfinite(value):
            value = math.inf
        better = not history.validation or value < min(each for _, each in history.validation)
        history.validation.append((self.done, value))
        if better:
            history.best, self.best, self.waited = self.done, self._parameters(), 0
        else:
            self.waited += 1
        history.stopped = self.done < recipe.steps and self.waited == (recipe.patience or -1)

    def finish(self) -> None:
        self._check_parameters(self.batches[max(0, self.done - 1)])
        if self.recipe.validation:
            self._put(self.best)
        else:
            self.history.best = self.done
        if self.folder is not None:
            self.reft.save(self.folder / "reft.safetensors")

    def save(self) -> None:
        assert self.folder is not None
        self._check_parameters(self.batches[self.done - 1])  # what goes on must be a good state
        history = self.history
        state = {
            "of": self._of(),
            "done": self.done,
            "waited": self.waited,
            "losses": history.losses,
            "validation": [list(each) for each in history.validation if math.isfinite(each[1])],
            "best_step": history.best,
            "stopped": history.stopped,
            "parameters": self._parameters(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(self.folder / "training.safetensors", state)

    def resume(self) -> None:
        """Goes on from the folder, where there is a training."""
        if self.folder is None or not (self.folder / "training.safetensors").is_file():
            return
        state = load_state(self.folder / "training.safetensors")
        for name, value in self._of().items():
            had = state["of"].get(name)
            if had != value:
                raise InvalidInput(
                    f"{self.folder} holds a training with {name}={had!r}, not {value!r}; use "
                    "another folder"
                )
        device = next(self.reft.parameters()).device
        self.best = {name: each.to(device) for name, each in state["best"].items()}
        self._put({name: each.to(device) for name, each in state["parameters"].items()})
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.waited = state["done"], state["waited"]
        validation = [(step, value) for step, value in state["validation"]]
        self.history = History(state["losses"], validation, state["best_step"], state["stopped"])
        self.good = self._parameters()

    def _of(self) -> dict[str, Any]:
        """What a training that goes on shares with the one that was stopped."""
        adapters = [each.extra_repr() for each in self.reft.adapters.values()]
        sizes = {"adapters": adapters, "rows": self.loss.rows, "calls": self.loss.moments}
        return self.recipe.said() | sizes | {"loss and its data": self._data}

    @cached_property
    def _data(self) -> str:
        return f"{type(self.loss).__name__} {hash_values(self.loss)[:16]}"

    def _check_parameters(self, batch: Batch) -> None:
        for site, adapter in self.reft.adapters.items():
            if not all(bool(each.isfinite().all()) for each in adapter.parameters()):
                self._fail(batch, "a parameter is not finite", site)

    def _check_gradients(self, batch: Batch) -> None:
        bad = [
            site
            for site, adapter in self.reft.adapters.items()
            for each in adapter.parameters()
            if each.grad is not None and not bool(each.grad.isfinite().all())
        ]
        if bad:
            self._fail(batch, "a gradient is not finite", ", ".join(dict.fromkeys(bad)))
        if self.recipe.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.reft.parameters(), self.recipe.grad_clip)

    def _fail(self, batch: Batch, what: str, site: str) -> None:
        self._put(self.good)
        rows = ", ".join(map(str, batch.rows.tolist()))
        where = "the adapters are in the last good state"
        if self.folder is not None:
            self.reft.save(self.folder / "reft.safetensors")
            where += f", in {self.folder / 'reft.safetensors'} too"
        raise NonFiniteLoss(
            f"step {self.done}: {what} on rows {rows}; site: {site}. A smaller lr or grad_clip may "
            f"help; {where}"
        )

    def _parameters(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.reft.named_parameters()}

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, each in self.reft.named_parameters():
                each.copy_(values[name])
