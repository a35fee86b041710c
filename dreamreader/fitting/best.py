"""The state of a module that validated best."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    return {name: each.detach().clone() for name, each in _name_tensors(module).items()}


@torch.no_grad()
def put_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Sets parameters and buffers to what `values_of` gave."""
    for name, each in _name_tensors(module).items():
        each.copy_(values[name])


def _name_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class Best:
    """Keeps parameters and buffers as they were when they validated best.

    The first state that is offered is kept, the one before it never. With several losses, each is
    of one slot: of what stands at this place of dimension 0 of every parameter and buffer.

    Args:
        module: whose state.

    Attributes:
        losses: float64, the least of each slot. at: int64, when it was offered.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.values = values_of(module)
        self.losses: Tensor | None = None
        self.at = torch.zeros((), dtype=torch.int64)

    def offer(self, at: int, losses: Tensor | float) -> bool:
        """Keeps the state of now where it is better; whether it is anywhere."""
        own = torch.as_tensor(losses).detach().cpu().double()
        own = own.masked_fill(own.isnan(), torch.inf)
        if self.losses is None:
            self.losses, better = own.clone(), torch.ones_like(own, dtype=torch.bool)
            self.at = torch.full(own.shape, at)
        else:
            better = own < self.losses
            self.losses = torch.where(better, own, self.losses)
            self.at[better] = at
        for name, now in _name_tensors(self.module).items():
            if better.dim() == 0:
                if bool(better):
                    self.values[name].copy_(now.detach())
            else:
                chosen = better.to(now.device)
                self.values[name][chosen] = now.detach()[chosen]
        return bool(better.any())

    def restore(self) -> None:
        put_values(self.module, self.values)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "losses": self.losses, "at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, each in self.values.items():
            each.copy_(state["values"][name])
        self.losses, self.at = state["losses"], state["at"]
