"""Cases of the largest entries of rows."""

from dataclasses import dataclass

import torch

from dreamreader.ops import topk_reference
from tests.cases._example import Example
from tests.cases._matrices import LAYOUTS, SHAPES, VALUES, identical, matrix
from tests.cases._operator import Operator, gather, triton_of


@dataclass(frozen=True)
class Case:
    """A matrix, and how many entries each row keeps."""

    shape: tuple[int, int]
    k: int
    values: str = "normal"
    layout: str = "dense"

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.k}-{self.values}-{self.layout}"

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        return matrix(self.values, self.shape, dtype, self.layout), self.k


CASES = [
    *(Case(shape, k) for shape in SHAPES for k in {0, 1, 5, shape[1], shape[1] + 1}),
    *(Case((6, 1500), k, values) for values in VALUES for k in (1, 16, 700)),
    *(Case((7, 300), 4, layout=layout) for layout in LAYOUTS),
]
OPERATORS = {"topk": [Example("few", Case((3, 8), 2).arguments, learned=(0,), twice=(0,))]}
INTERPRETED = [
    *(Case((3, 60), k, values) for values in VALUES for k in (1, 7)),
    *(Case((3, 7), k) for k in (0, 1, 7, 8)),
    *(Case(shape, 2) for shape in ((0, 5), (3, 0), (1, 1), (2, 129))),
    *(Case((3, 30), 4, layout=layout) for layout in LAYOUTS),
    Case((2, 2000), 1025),  # no list is as long
]
TESTED = [
    Operator(
        "topk",
        cases=lambda dtype: CASES,
        arguments=Case.arguments,
        reference=topk_reference,
        judge=identical,
        launch=gather,
        triton=triton_of("dreamreader.ops.topk", INTERPRETED),
        large=[Case((300, 3000), 20)],
    )
]
