"""Logits in half precision on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Give the head of a language model its input in one piece while this is entered.

    Logits of the last positions alone are those of a slice, for which torch copies a half-precision
    matrix of the whole vocabulary once for every row: hundreds of times slower than the product.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if not (isinstance(head, nn.Module) and isinstance(weight, Tensor)) or (
        weight.device.type != "cpu" or weight.dtype not in HALF
    ):
        yield
        return
    handle = head.register_forward_pre_hook(_in_one_piece)
    try:
        yield
    finally:
        handle.remove()


def _in_one_piece(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in inputs)
