"""Adam for weights that lie transposed."""

from typing import Any

import torch
from torch import Tensor


class StridedAdam(torch.optim.Adam):
    """Torch's Adam, which reads transposed matrices as they lie in memory.

    The one kernel for all of a step copies gradients that are not contiguous, and `W_enc`, whose
    transpose is, would cost as much as the rest of the step. Results are the same bits.
    """

    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, group: dict[str, Any], *lists: list[Tensor]
    ) -> Any:
        found = super()._init_group(group, *lists)
        parameters, gradients = lists[:2]
        for place, each in enumerate(parameters):
            if not _lies_transposed(each) or not _lies_transposed(gradients[place]):
                continue
            for values in lists[:5]:  # gradients, both averages and the largest of one
                if place < len(values):
                    values[place] = values[place].detach().mT
        return found


def _lies_transposed(x: Tensor) -> bool:
    return x.dim() == 2 and not x.is_contiguous() and x.mT.is_contiguous()
