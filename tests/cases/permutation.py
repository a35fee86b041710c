"""Cases of the permutation: ranges around powers of two and beyond 2^32, and seeds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamreader.ops import permuted, permuted_reference
from tests.cases._example import Example
from tests.cases._operator import Operator

SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097, 16385]
LARGE = [10**9 + 7, 2**40 + 1, 2**61 - 1, 2**61 + 1, 2**62]


@dataclass(frozen=True)
class Case:
    """500 places among n."""

    n: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.n}-{self.seed}"

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of `permuted`."""
        g = torch.Generator().manual_seed(self.n % 1000)
        return torch.randint(0, self.n, (500,), generator=g), self.n, self.seed


def reference(indices: Tensor, n: int, seed: int) -> Tensor:
    return torch.from_numpy(permuted_reference(indices.numpy(), n, seed))


CASES = [Case(n, seed) for n in SIZES + LARGE for seed in (0, 7, 2**63 + 11, -3)]
OPERATORS: dict[str, list[Example]] = {}
TESTED = [
    Operator(
        "permuted",
        cases=lambda dtype: CASES,
        arguments=Case.arguments,
        reference=reference,
        call=permuted,
        dtypes=(torch.int64,),
    )
]
