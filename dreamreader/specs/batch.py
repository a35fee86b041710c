"""How many rows share a call: by the memory that their activations take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dreamreader.errors import InvalidInput
from dreamreader.specs.parts import Batch

MOST_ROWS = 48  # in one call; more gain nothing on a CPU and little on a GPU
GIB = 2**30


def activation_bytes(subject: Any, run: Callable[[], Any]) -> int:
    """Bytes of activations of what `run` runs the subject on.

    An estimate from what modules give: three times the largest result, and half of all others,
    which residual connections and attention may hold at the same time.
    """
    sizes: list[int] = []

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        sizes.append(sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor)))

    parts = getattr(subject, "components", {"": subject}).values()
    leaves = [
        module
        for part in parts
        if isinstance(part, nn.Module)
        for module in part.modules()
        if not any(True for _ in module.children())
    ]
    handles = [module.register_forward_hook(measure) for module in leaves]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return 3 * max(sizes, default=0) + sum(sizes) // 2


def rows_that_fit(batch: Batch, row_bytes: float) -> int:
    """Rows of one call, as the spec says or as many as fit the memory.

    Raises:
        InvalidInput: the memory does not hold a single row.
    """
    if isinstance(batch.rows, int):
        return batch.rows
    from dreamreader.engine import available_memory

    allowed = batch.memory * GIB if batch.memory is not None else available_memory() / 2
    fitting = int(allowed // max(row_bytes, 1))
    if fitting < 1:
        raise InvalidInput(
            f"batch.memory: one row takes about {row_bytes / GIB:.2g} GiB, {allowed / GIB:.2g} "
            "GiB are allowed"
        )
    return min(fitting, MOST_ROWS)


def duration(seconds: float) -> str:
    """A time in the unit that fits it."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
