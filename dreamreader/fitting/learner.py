"""One module in training: its optimiser, its checks, its best state and its history."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.fitting.best import Best, put_values, values_of
from dreamreader.fitting.objective import Objective
from dreamreader.fitting.recipe import Recipe

AroundStep = Callable[[Any, int], None]
"""Called as (module, steps done) before or after a step of its optimiser, without recording."""


class NonFiniteLoss(DreamreaderError, FloatingPointError):
    """A loss, gradient or parameter is no number any more; the module is in the last good state."""


@dataclass
class History:
    """How the training of a module went.

    Attributes:
        losses: of each step. validation: (steps done, loss on what was held out).
        best: steps done where the kept state comes from; the latest, where `slots` differ.
        stopped: before the last step. slots: `best` of each slot, see `Best`.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    stopped: bool = False
    slots: tuple[int, ...] = ()


class Learner:
    """A module that learns from batches.

    Args:
        name: in errors, may be empty. module: trained in place.
        total: steps in all, where that is known.
        check_every: steps between two looks at parameters and gradients; None: at the loss alone.
        validated: whether the state that validates best is kept.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        objective: Objective,
        recipe: Recipe,
        total: int | None,
        check_every: int | None,
        validated: bool,
        before_step: AroundStep | None,
        after_step: AroundStep | None,
    ):
        self.name, self.module, self.objective, self.recipe = name, module, objective, recipe
        self.total, self.check_every = total, check_every
        self.before_step, self.after_step = before_step, after_step
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        if not self.parameters:
            raise InvalidInput(f"fit: {self._title}there are no parameters to train")
        self.optimizer = recipe.build_optimizer(self.parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history = History()
        self.good = None if check_every is None else values_of(module)
        self.best = Best(module) if validated else None
        self._last: tuple[Any] | None = None  # the batch of the last step

    def step(self, batch: Any, done: int) -> float | None:
        """One step of the optimiser.

        Args:
            batch: to learn from. done: steps before this one.

        Returns:
            The loss, or None where the batch holds nothing for this module.
        """
        checked = self.check_every is not None and done % self.check_every == 0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = self.recipe.rate(rate, done, self.total)
        first = self._loss(batch, done, checked)
        if first is None:
            return None
        waiting, values = [first], list[float]()

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            total = waiting.pop() if waiting else self._loss(batch, done, checked)
            assert total is not None
            value = float(total.detach())
            if not math.isfinite(value):
                culprit = self.objective.culprit(self.module, batch)
                raise self.fail(done, batch, f"the loss is {value}", culprit)
            if checked and not values:
                self.good = values_of(self.module)
            total.backward()
            if checked:
                self._check_gradients(batch, done)
            if self.before_step is not None:
                with torch.no_grad():
                    self.before_step(self.module, done)
            if self.recipe.grad_clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.recipe.grad_clip)
            values.append(value)
            return total

        self.optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._last = (batch,)
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step(self.module, done + 1)
        self.history.losses.append(values[0])
        return values[0]

    def offer(self, done: int, losses: Tensor | float) -> bool:
        """Takes the validation of the state of now; whether it is better, in any slot."""
        assert self.best is not None
        better = self.best.offer(done, losses)
        value = float(torch.as_tensor(losses, dtype=torch.float64).mean())
        self.history.validation.append((done, value if math.isfinite(value) else math.inf))
        self.history.best = int(self.best.at.max())
        self.history.slots = tuple(self.best.at.reshape(-1).tolist())
        return better

    def finish(self, done: int) -> None:
        """Leaves the best state, or the last without validation."""
        if self.check_every is not None:
            self.check(done)
        if self.best is not None and self.history.validation:
            if all(math.isinf(value) for _, value in self.history.validation):
                raise NonFiniteLoss("fit: no validation was finite, so that no state is the best")
            self.best.restore()
        else:
            self.history.best = done

    def check(self, done: int) -> None:
        """Refuses parameters that are not finite.

        Raises:
            NonFiniteLoss: with the part; the module is in the last good state.
        """
        bad = self._not_finite(lambda each: each)
        if bad:
            batch = self._last[0] if self._last else None
            raise self.fail(done, batch, "a parameter is not finite", bad[0])

    def state_dict(self) -> dict[str, Any]:
        history = self.history
        return {
            "values": values_of(self.module),
            "optimizer": self.optimizer.state_dict(),
            "best": None if self.best is None else self.best.state_dict(),
            "losses": torch.tensor(history.losses, dtype=torch.float64),
            "validation": history.validation,
            "best_step": history.best,
            "stopped": history.stopped,
            "slots": history.slots,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        put_values(self.module, state["values"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise InvalidInput(
                f"fit: {self._title}the checkpoint is of another optimizer: {error}"
            ) from error
        _restore_layout(self.optimizer)
        if self.best is not None:
            self.best.load_state_dict(state["best"])
        losses, validation = state["losses"].tolist(), list(state["validation"])
        self.history = History(
            losses, validation, state["best_step"], state["stopped"], state["slots"]
        )
        self.good = None if self.check_every is None else values_of(self.module)

    def fail(self, done: int, batch: Any, what: str, part: str) -> NonFiniteLoss:
        """Puts the last good state back; the error."""
        where = "" if batch is None else self.objective.describe(batch)
        said = f"{self._title}step {done}: {what}{f' on {where}' if where else ''}"
        said += f"; {self.objective.part_name}: {part}. A smaller lr or grad_clip may help"
        if self.good is not None:
            put_values(self.module, self.good)
            said += "; the parameters are in the last good state"
        return NonFiniteLoss(said)

    @property
    def _title(self) -> str:
        return f"{self.name}: " if self.name else ""

    def _loss(self, batch: Any, done: int, checked: bool) -> Tensor | None:
        if checked:
            bad = self._not_finite(lambda each: each)
            if bad:
                raise self.fail(done, batch, "a parameter is not finite", bad[0])
        with torch.enable_grad():
            terms = self.objective.terms(self.module, batch)
            if terms is None or isinstance(terms, Tensor):
                return terms
            return torch.stack(list(terms.values())).sum()

    def _check_gradients(self, batch: Any, done: int) -> None:
        bad = self._not_finite(lambda each: each.grad)
        if bad:
            raise self.fail(done, batch, "a gradient is not finite", ", ".join(bad))

    def _not_finite(self, tensor_of: Callable[[nn.Parameter], Tensor | None]) -> list[str]:
        """Names of the parts of which a tensor is not finite; of fine ones one number is read."""
        tensors = [found for each in self.parameters if (found := tensor_of(each)) is not None]
        # a norm may overflow where all values are finite, so it only excuses
        if not tensors or math.isfinite(float(nn.utils.get_total_norm(tensors))):
            return []
        return [
            name
            for name, own in self.objective.parts(self.module).items()
            if any(
                (t := tensor_of(each)) is not None and not bool(t.isfinite().all()) for each in own
            )
        ]


def _restore_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lays averages that were read as parameters lie: another layout is another loop."""
    for parameter, state in optimizer.state.items():
        for name, each in state.items():
            if isinstance(each, Tensor) and each.shape == parameter.shape:
                laid = torch.empty_like(parameter, dtype=each.dtype, device=each.device)
                state[name] = laid.copy_(each)
