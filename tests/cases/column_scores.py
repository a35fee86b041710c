"""Cases of the scores of columns."""

from dataclasses import dataclass

import torch

from dreamreader.ops import column_scores_reference
from dreamreader.ops.column_scores import SUMMED
from tests.cases._example import Example
from tests.cases._matrices import LAYOUTS, SHAPES, VALUES, matrix
from tests.cases._operator import Operator, gather, triton_of


@dataclass(frozen=True)
class Case:
    """A matrix and a score."""

    shape: tuple[int, int]
    score: str
    values: str = "normal"
    layout: str = "dense"

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.score}-{self.values}-{self.layout}"

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        return matrix(self.values, self.shape, dtype, self.layout), self.score


CASES = [
    Case(shape, score, values, layout)
    for score in SUMMED
    for shape, values, layout in [
        *((shape, "normal", "dense") for shape in SHAPES),
        *(((150, 40), values, "dense") for values in VALUES),
        *(((70, 21), "normal", layout) for layout in LAYOUTS),
        ((2000, 9), "normal", "dense"),
    ]
]
OPERATORS = {"column_scores": [Example("l2", Case((3, 8), "l2").arguments)]}
INTERPRETED = [
    Case(shape, score, values, layout)
    for score in SUMMED
    for shape, values, layout in [
        *((shape, "normal", "dense") for shape in ((0, 5), (3, 0), (1, 1), (150, 70))),
        *(((50, 9), values, "dense") for values in VALUES),
        *(((20, 21), "normal", layout) for layout in LAYOUTS),
    ]
]
TESTED = [
    Operator(
        "column_scores",
        cases=lambda dtype: CASES,
        arguments=Case.arguments,
        reference=column_scores_reference,
        launch=gather,
        triton=triton_of("dreamreader.ops.column_scores", INTERPRETED),
        large=[Case((500, 2500), score) for score in ("l2", "entropy")],
    )
]
