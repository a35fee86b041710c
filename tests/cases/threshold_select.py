"""Cases of the entries above a threshold."""

from dataclasses import dataclass

import torch

from dreamreader.ops import threshold_select_reference
from tests.cases._example import Example
from tests.cases._matrices import LAYOUTS, SHAPES, VALUES, identical, matrix
from tests.cases._operator import Operator, gather, triton_of

THRESHOLDS = (-1.0, 0.0, 1e-7, 0.7, 1.0, 1e5, torch.inf, torch.nan)


@dataclass(frozen=True)
class Case:
    """A matrix, a threshold (None: one for each column), and the share of it there is room for."""

    shape: tuple[int, int]
    threshold: float | None
    values: str = "normal"
    layout: str = "dense"
    room: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.threshold}-{self.values}-{self.layout}-{self.room}"

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        x = matrix(self.values, self.shape, dtype, self.layout)
        if self.threshold is None:
            threshold = torch.randn(self.shape[1], generator=torch.Generator().manual_seed(4))
        else:
            threshold = torch.tensor(self.threshold)
        return x, threshold, round(x.numel() * self.room)


CASES = [
    *(Case(shape, threshold) for shape in SHAPES for threshold in (0.7, None)),
    *(Case((6, 700), threshold, values) for values in VALUES for threshold in (*THRESHOLDS, None)),
    *(Case((6, 700), None, layout=layout) for layout in LAYOUTS),
    Case((6, 700), 0.5, room=0.1),
    Case((6, 700), 0.5, room=0.0),
]
OPERATORS = {
    "threshold_select": [
        Example("one", Case((3, 8), 0.2).arguments, learned=(0,), twice=(0,)),
        Example("each", Case((3, 8), None, room=0.7).arguments, learned=(0,), twice=(0,)),
    ]
}
INTERPRETED = [
    *(Case((3, 60), None, values) for values in VALUES),
    *(Case((3, 60), threshold, "inf") for threshold in THRESHOLDS),
    *(Case((3, 60), threshold, "tiny") for threshold in THRESHOLDS[:3]),
    *(Case(shape, 0.5) for shape in ((0, 5), (3, 0), (1, 1), (2, 129))),
    *(Case((3, 30), None, layout=layout) for layout in LAYOUTS),
    *(Case((3, 60), 0.5, room=room) for room in (0.0, 0.1)),
]
TESTED = [
    Operator(
        "threshold_select",
        cases=lambda dtype: CASES,
        arguments=Case.arguments,
        reference=threshold_select_reference,
        judge=identical,
        widened=lambda args: args,
        launch=gather,
        triton=triton_of("dreamreader.ops.threshold_select", INTERPRETED),
        large=[Case((300, 3000), None)],
    )
]
