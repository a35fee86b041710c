"""Cases of orthonormal rows: shapes, one row, as many rows as features, stacks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamreader.ops.orthonormal import orthonormal_reference
from tests.cases._example import Example
from tests.cases._operator import Operator

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


@dataclass(frozen=True)
class Case:
    """Rows [..., rank, width]."""

    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.shape)


TESTED = [
    Operator(
        "orthonormal",
        cases=lambda dtype: [Case(shape) for shape in [*CASES, (1, 1), (40, 1280)]],
        arguments=lambda case, dtype: (rows(case.shape, dtype),),
        reference=orthonormal_reference,
        dtypes=(torch.float32, torch.float64),
    )
]
