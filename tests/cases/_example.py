"""What the tests of every operator at once need to know of one: arguments, and its derivatives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Example:
    """One call of a registered operator.

    Attributes:
        name: says which.
        arguments: as the operator takes them, from the dtype of the activation, new ones each time.
        learned: places of the arguments that get a gradient.
        twice: those among them that may require grad where a second derivative is written.
    """

    name: str
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    learned: tuple[int, ...] = ()
    twice: tuple[int, ...] = ()
