"""Processes that train the same autoencoders on shares of each batch."""

from dataclasses import replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from dreamreader.sae.loss import SaeLoss


class Ranks:
    """The processes of torch.distributed, which was begun before.

    What is averaged over rows (squared error, gradients) is that of one process on the whole batch,
    as shares are equal. A selection is over the rows of its process: `TopK` and `JumpReLU` keep the
    same as one process does, `BatchTopK` keeps round(k * rows of the process) in each share, and
    `SampledTopK` scores columns by the rows of the share; aux-k relates to the residual of the
    share. Thresholds follow the mean over processes of what each kept last, counters of dead
    latents the rows of all.

    Attributes:
        rank: of this process. world: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def gather_rows(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "all_rows d"]:
        """The rows of all processes, in the order of ranks; each has as many."""
        found = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(found, x.contiguous())
        return torch.cat(found)

    def average_gradients(self, module: nn.Module) -> None:
        """Puts the mean over processes in place of each gradient."""
        gradients = [each.grad for each in module.parameters() if each.grad is not None]
        if not gradients:
            return
        flat = torch.cat([each.reshape(-1) for each in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for own, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            own.copy_(mean.view_as(own))

    def combine(self, result: SaeLoss) -> SaeLoss:
        """What a step remembers of the shares of all processes."""
        fired = result.fired.int()
        dist.all_reduce(fired, dist.ReduceOp.MAX)
        kept = result.smallest >= 0  # NaN and none are not
        numbers = torch.stack(
            [
                torch.where(kept, result.smallest, 0.0).double(),
                kept.double(),
                *(getattr(result, name).double() for name in ("mse", "aux", "fvu", "l0", "dead")),
            ]
        )
        dist.all_reduce(numbers)
        smallest = torch.where(numbers[1] > 0, numbers[0] / numbers[1], -1.0)
        mean = dict(zip(("mse", "aux", "fvu", "l0", "dead"), numbers[2:] / self.world, strict=True))
        return replace(
            result,
            **mean,
            fired=fired.bool(),
            smallest=smallest.to(result.smallest.dtype),
            tokens=result.tokens * self.world,
        )
