"""Cases of orthonormal rows: shapes, one row, as many rows as features, stacks."""

import torch
from torch import Tensor

from tests.cases._example import Example

CASES = [(3, 7), (1, 4), (4, 4), (2, 3, 5)]


def rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows that are far from dependent."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


OPERATORS = {
    "orthonormal": [
        Example(str(shape), lambda dtype, s=shape: (rows(s, dtype),), learned=(0,), twice=(0,))
        for shape in CASES
    ]
}
