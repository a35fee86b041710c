"""Cases of the choice of tokens: sizes of entries, shares that are kept, shifted coordinates."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreamreader.ops import choose, choose_reference
from tests.cases._example import Example
from tests.cases._operator import Operator


def batch(sizes: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Entries with so many candidates each, every second or third token."""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randperm(3 * size, generator=g)[:size].sort().values for size in sizes]
    n = len(sizes)
    return {
        "tokens": torch.cat([*parts, torch.empty(0)]).int(),
        "offsets": torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32),
        "entries": torch.randperm(n, generator=g).int(),
        "samples": torch.randint(0, 10**6, (n,), generator=g).int(),
        "branches": torch.randint(0, 3, (n,), generator=g).int(),
        "streams": torch.randint(-(2**63), 2**63 - 1, (n,), generator=g),
    }


@dataclass(frozen=True)
class Case:
    """Entries, and how many of their candidates are kept."""

    sizes: tuple[int, ...]
    share: float | None
    shifted: bool

    @property
    def name(self) -> str:
        return f"{self.sizes}-{self.share}-{self.shifted}"

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of `choose`; they have one type."""
        kept = None if self.share is None else [int(size * self.share) for size in self.sizes]
        counts = None if kept is None else torch.tensor(kept, dtype=torch.int32)
        shift = torch.arange(len(self.sizes)).int() - 3 if self.shifted else None
        return batch(list(self.sizes)), 9, counts, shift


def call(function: Callable) -> Callable:
    """`choose` or its definition, with the optional arguments by name."""
    return lambda entries, moment, counts, shift: function(
        **entries, moment=moment, counts=counts, shift=shift
    )


SIZES = [(5,), (1, 0, 64), (63, 65, 128, 1), (), (0,), (1000, 3, 517)]
CASES = [
    Case(sizes, share, shifted)
    for sizes in SIZES
    for share in (None, 0.0, 0.3, 0.5, 0.51, 0.9, 1.0, 2.0)
    for shifted in (False, True)
]
OPERATORS: dict[str, list[Example]] = {}
TESTED = [
    Operator(
        "choose",
        cases=lambda dtype: CASES,
        arguments=Case.arguments,
        reference=call(choose_reference),
        call=call(choose),
        dtypes=(torch.int32,),
    )
]
