"""What an oracle writes down, and how it changes one module by hand."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    step: index of the solver's step in its full trajectory; both evaluations of a two-evaluation
        step share it, and a run that starts on the way (img2img) starts above 0.
    timestep: the scheduler's value at which the denoiser is evaluated, before a pipeline scales it.
    sigma: noise level of the denoiser's input. Diffusion: sqrt((1 - a) / a), a = cumulative alpha.
        Flow matching: the share of noise, 1 at pure noise.
    fraction: share of the full trajectory done before this step, 0 at pure noise.
    evaluation: 0, or 1 for the second evaluation of a step.
    branches: names of the equal chunks of the batch, in order.
    """

    step: int
    timestep: float
    sigma: float
    fraction: float
    evaluation: int
    branches: tuple[str, ...] = ("cond",)


@dataclass(frozen=True)
class Change:
    """A change of what one module gives out, or of what it takes in, in one branch and some steps.

    module: path below the denoiser. Of several outputs the first is meant; the batch comes first.
    apply: (step, branch, rows [N, ...]) -> changed rows.
    at: "out", or "in" for the module's first argument.
    """

    module: str
    branch: str
    steps: Iterable[int]
    apply: Callable[[int, str, Tensor], Tensor]
    at: str = "out"

    def __call__(self, call: Call, tensor: Tensor) -> Tensor:
        if self.branch not in call.branches or call.step not in self.steps:
            return tensor
        chunks = list(tensor.chunk(len(call.branches)))
        place = call.branches.index(self.branch)
        chunks[place] = self.apply(call.step, self.branch, chunks[place])
        return torch.cat(chunks)


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
        handle = self._watch(call, self.change) if self.change is not None else None
        try:
            return self.module(*args, **kwargs, return_dict=False)[0]
        finally:
            if handle is not None:
                handle.remove()

    def _watch(self, call: Call, change: Change) -> RemovableHandle:
        module = self.module.get_submodule(change.module)
        if change.at == "in":
            return module.register_forward_pre_hook(
                lambda module, inputs: (change(call, inputs[0]), *inputs[1:])
            )
        return module.register_forward_hook(
            lambda module, inputs, output: (
                (change(call, output[0]), *output[1:])
                if isinstance(output, tuple)
                else change(call, output)
            )
        )
