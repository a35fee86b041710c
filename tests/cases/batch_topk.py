"""Cases of the largest entries of all rows together."""

from dataclasses import dataclass

import torch

from dreamreader.ops import batch_topk_reference
from tests.cases._example import Example
from tests.cases._matrices import LAYOUTS, SHAPES, VALUES, identical, matrix
from tests.cases._operator import Operator, gather, triton_of


@dataclass(frozen=True)
class Case:
    """A matrix, how many entries are kept, and the share of columns in the pool."""

    shape: tuple[int, int]
    count: int
    values: str = "normal"
    layout: str = "dense"
    pool: float | None = None

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.count}-{self.values}-{self.layout}-{self.pool}"

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        x, width = matrix(self.values, self.shape, dtype, self.layout), self.shape[1]
        if self.pool is None:
            return x, self.count, None
        order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
        return x, self.count, order[: round(self.pool * width)].sort().values.int()


def counts(shape: tuple[int, int]) -> list[int]:
    """Around what a matrix has."""
    rows, size = shape[0], shape[0] * shape[1]
    if size > 20_000:
        return [5 * rows, size // 2]
    return sorted({0, 1, 5 * rows, size // 2, max(0, size - 1), size, size + 5})


# Of more than 2^16 entries a sample is taken.
CASES = [
    *(Case(shape, count) for shape in SHAPES for count in counts(shape)),
    *(Case((50, 1500), 960, values) for values in VALUES),
    *(Case((20, 900), count, values) for values in VALUES for count in (1, 7000)),
    *(Case((50, 1500), 960, values, pool=0.2) for values in ("normal", "half_ties", "all_nan")),
    *(Case((20, 900), 960, pool=pool) for pool in (0.0, 0.01, 1.0)),
    *(Case((50, 1400), 40, layout=layout) for layout in LAYOUTS),
]
FEW = Case((3, 8), 5)
OPERATORS = {
    "batch_topk": [
        Example("few", FEW.arguments, learned=(0,), twice=(0,)),
        Example("pool", Case((3, 8), 5, pool=0.5).arguments, learned=(0,), twice=(0,)),
    ]
}
INTERPRETED = [
    *(Case((3, 60), 50, values) for values in VALUES),
    *(Case((3, 7), count) for count in (0, 1, 20, 21, 30)),
    *(Case(shape, 2) for shape in ((0, 5), (3, 0), (1, 1), (2, 129))),
    *(Case((3, 30), 20, layout=layout) for layout in LAYOUTS),
    *(Case((3, 60), count, pool=pool) for count in (1, 40) for pool in (0.0, 0.3, 1.0)),
]
TESTED = [
    Operator(
        "batch_topk",
        cases=lambda dtype: CASES,
        arguments=Case.arguments,
        reference=batch_topk_reference,
        judge=identical,
        launch=gather,
        triton=triton_of("dreamreader.ops.batch_topk", INTERPRETED),
        large=[Case((300, 3000), 6000), Case((300, 3000), 6000, "half_ties")],
    )
]
