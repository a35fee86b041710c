"""LoReFT trained on given pairs with pyreft's module and with our operators.

Both start from the same R, W and b and see the same batches, in the same loop with the same
optimiser: only what computes the edit differs. Imported in the environment of pyreft.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyreft import LoreftIntervention
from torch import Tensor, nn

from dreamreader.ops import low_rank, orthonormal


class Ours(nn.Module):
    """The edit of an intervention of pyreft, with our operators."""

    def __init__(self, start: LoreftIntervention):
        super().__init__()
        self.weight = nn.Parameter(start.learned_source.weight.detach().clone())
        self.bias = nn.Parameter(start.learned_source.bias.detach().clone())
        self.rows = nn.Parameter(start.rotate_layer.weight.detach().T.contiguous())

    def forward(self, h: Tensor) -> Tensor:
        rotation = orthonormal(self.rows)
        return low_rank(h.unsqueeze(0), self.weight - rotation, self.bias, rotation).squeeze(0)


@dataclass(frozen=True)
class Pairs:
    """Activations [rows, width] to train on and held out, with what the teacher has there."""

    base: Tensor
    teacher: Tensor
    held_base: Tensor
    held_teacher: Tensor

    def error(self, module: nn.Module) -> float:
        """Squared error on the held-out rows, as a share of that without an edit."""
        with torch.no_grad():
            left = (module(self.held_base) - self.held_teacher).square().mean()
        return float(left / (self.held_base - self.held_teacher).square().mean())


@dataclass(frozen=True)
class Settings:
    rank: int
    batch: int
    steps: int
    lr: float
    every: int  # steps between two looks at the held-out rows


def fresh(name: str, pairs: Pairs, settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    start = LoreftIntervention(
        embed_dim=pairs.base.shape[1], low_rank_dimension=settings.rank, dtype=torch.float32
    )
    return start if name == "pyreft" else Ours(start)


def train(
    module: nn.Module,
    pairs: Pairs,
    settings: Settings,
    steps: int,
    look: Callable[[int], bool] | None = None,
) -> None:
    """Trains for so many steps, or until `look`, asked now and then, says that it is enough."""
    optimiser = torch.optim.Adam(module.parameters(), lr=settings.lr)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        rows = torch.randint(len(pairs.base), (settings.batch,), generator=generator)
        loss = (module(pairs.base[rows]) - pairs.teacher[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if look is not None and step % settings.every == 0 and look(step):
            return


def compared(pairs: Pairs, settings: Settings) -> dict[str, dict[str, float]]:
    """Steps and held-out error of both, ours as soon as it is no worse than pyreft at its end."""
    peer = fresh("pyreft", pairs, settings)
    train(peer, pairs, settings, settings.steps)
    wanted, module = pairs.error(peer), fresh("dreamreader", pairs, settings)
    reached = {"steps": float("inf"), "error": float("inf")}

    def look(step: int) -> bool:
        error = pairs.error(module)
        reached.update(steps=step if error <= wanted else float("inf"), error=error)
        return error <= wanted

    train(module, pairs, settings, 2 * settings.steps, look)
    return {"pyreft": {"steps": settings.steps, "error": wanted}, "dreamreader": reached}


def calls(pairs: Pairs, settings: Settings, steps: dict[str, int]) -> dict[str, Callable[[], None]]:
    """What is timed: training alone, for the steps that each needs; modules are made before."""
    modules = {name: fresh(name, pairs, settings) for name in steps}
    begin = {name: {k: v.clone() for k, v in m.named_parameters()} for name, m in modules.items()}

    def call(name: str) -> None:
        with torch.no_grad():
            for key, value in modules[name].named_parameters():
                value.copy_(begin[name][key])
        train(modules[name], pairs, settings, steps[name])

    return {name: lambda n=name: call(n) for name in steps}
