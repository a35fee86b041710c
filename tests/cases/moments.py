"""Cases of the moments: shapes around every division of the work, labels, layouts and values."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from dreamreader.ops import moments_reference
from tests.cases._example import Example
from tests.cases._operator import Operator

LABELS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "many": lambda n, g: torch.randint(0, 300, (n,), generator=g),
    "mixed": lambda n, g: torch.randint(0, 3, (n,), generator=g),
    "some_left_out": lambda n, g: torch.randint(-1, 3, (n,), generator=g),
    "all_left_out": lambda n, g: torch.full((n,), -1),
    "one": lambda n, g: torch.full((n,), 2),
    "sorted": lambda n, g: torch.randint(0, 3, (n,), generator=g).sort().values,
    "strided": lambda n, g: torch.randint(0, 3, (2 * n,), generator=g)[::2],
}


@dataclass(frozen=True)
class Case:
    """Labelled rows."""

    name: str
    shape: tuple[int, int]  # rows, features
    labels: str = "mixed"
    layout: str = "dense"
    scale: float = 1.0
    offset: float = 0.0
    count: int = 3
    squares: bool = True

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        return *self.inputs(dtype), self.count, self.squares

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in the memory layout of the case, labels, and a shift near the rows."""
        noise, center, labels = draw(self.shape, self.labels)
        x = noise * self.scale + self.offset
        shift = (center + self.offset).to(dtype).double()
        return lay_out(x.to(dtype), self.layout), labels, shift


@lru_cache(maxsize=1)  # a case asks for the same several times
def draw(shape: tuple[int, int], labels: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normal values [rows, features] and [features], and labels."""
    g = torch.Generator().manual_seed(3)
    values = torch.randn(shape, generator=g), torch.randn(shape[1], generator=g)
    return *values, LABELS[labels](shape[0], g)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    rows, features = x.shape
    match layout:
        case "dense":
            return x
        case "wide_rows":  # cut from wider rows, starting one element in
            wide = x.new_full((rows, features + 3), torch.nan)
            wide[:, 1 : features + 1] = x
            return wide[:, 1 : features + 1]
        case "transposed":
            return x.T.contiguous().T
        case "every_second":
            wide = x.new_full((rows, 2 * features), torch.nan)
            wide[:, ::2] = x
            return wide[:, ::2]
        case "expanded":  # one row, many times
            return x[:1].expand(rows, features)
    raise AssertionError(layout)


# Two of each, of the fewest values.
TILES = Case("pieces_and_tiles", (8200, 2050), layout="wide_rows")
SHAPES = [(0, 5), (1, 1), (3, 1), (5, 8), (31, 7), (33, 64), (65, 100), (700, 33), (40, 2049)]
CASES = [
    *(Case(f"{rows}x{features}", (rows, features)) for rows, features in SHAPES),
    *(Case(labels, (97, 19), labels=labels) for labels in LABELS if labels != "many"),
    *(
        Case(layout, (70, 21), layout=layout)
        for layout in ("wide_rows", "transposed", "every_second", "expanded")
    ),
    Case("many_pieces", (13_000, 12), labels="some_left_out"),
    TILES,
    Case("far_from_zero", (200, 16), offset=1000.0),
    Case("many_labels", (170, 9), labels="many", count=300),
    Case("tiny", (50, 16), scale=1e-6),
]

FEW = Case("few", (7, 5), labels="some_left_out")
OPERATORS = {
    "moments": [
        Example(f"squares_{squares}", replace(FEW, squares=squares).arguments)
        for squares in (True, False)
    ]
}


def both(dtype: torch.dtype) -> list[Case]:
    """All with squares, a half without; that of many values, which takes a second, in one type."""
    few = [case for case in CASES[::2] if case is not TILES or dtype == torch.float32]
    return [*CASES, *(replace(case, squares=False) for case in few)]


TESTED = [
    Operator(
        "moments",
        cases=both,
        arguments=Case.arguments,
        reference=moments_reference,
        large=[Case("threads", (20_000, 30))],
    )
]
