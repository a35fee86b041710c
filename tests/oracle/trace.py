"""What an oracle writes down, and how it changes one module by hand."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    step: index of the solver's step within this run, from 0; both evaluations of a two-evaluation
        step share it.
    timestep: the scheduler's value at which the denoiser is evaluated, before a pipeline scales it.
    sigma: noise level of the denoiser's input. Diffusion: sqrt((1 - a) / a), a = cumulative alpha.
        Flow matching: the share of noise, 1 at pure noise.
    evaluation: 0, or 1 for the second evaluation of a step.
    branches: names of the equal chunks of the batch, in order.
    """

    step: int
    timestep: float
    sigma: float
    evaluation: int
    branches: tuple[str, ...] = ("cond",)


@dataclass(frozen=True)
class Change:
    """A change of one module's output, in one branch, in some steps.

    module: path below the denoiser; its output is a tensor with the batch first.
    apply: (step, branch, rows [N, ...]) -> changed rows.
    """

    module: str
    branch: str
    steps: Iterable[int]
    apply: Callable[[int, str, Tensor], Tensor]


@dataclass
class Trace:
    """The log of a run and what it ended in."""

    calls: list[Call] = field(default_factory=list)
    latents: Tensor = field(default_factory=lambda: torch.empty(0))


class Denoiser:
    """Calls the real denoiser with the log kept and the change applied.

    The caller says before each call what the call is; nothing is inferred here.
    """

    def __init__(self, module: nn.Module, change: Change | None = None) -> None:
        self.module = module
        self.change = change
        self.calls: list[Call] = []

    def __call__(self, call: Call, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append(call)
        if self.change is None:
            return self.module(*args, **kwargs, return_dict=False)[0]
        handle = self.module.get_submodule(self.change.module).register_forward_hook(
            lambda module, inputs, output: self._changed(call, output)
        )
        try:
            return self.module(*args, **kwargs, return_dict=False)[0]
        finally:
            handle.remove()

    def _changed(self, call: Call, output: Tensor) -> Tensor:
        change = self.change
        assert change is not None
        if change.branch not in call.branches or call.step not in change.steps:
            return output
        chunks = list(output.chunk(len(call.branches)))
        place = call.branches.index(change.branch)
        chunks[place] = change.apply(call.step, change.branch, chunks[place])
        return torch.cat(chunks)
