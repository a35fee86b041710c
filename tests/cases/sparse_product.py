"""Cases of the products of sparse rows: how entries lie, sizes around every block, and types."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dreamreader.ops import (
    sparse_column_sums_reference,
    sparse_decode_reference,
    sparse_dots_reference,
    sparse_outer_reference,
)
from dreamreader.ops._sparse_product_reference import sparse_decode_backward_reference
from tests.cases._example import Example
from tests.cases._operator import Kernel, Operator, doubled
from tests.cases.moments import lay_out

# How many entries each row has, of at most `most`.
COUNTS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "mixed": lambda n, most, g: torch.randint(0, most + 1, (n,), generator=g),
    "full": lambda n, most, g: torch.full((n,), most),
    "none": lambda n, most, g: torch.zeros(n, dtype=torch.int64),
    "one_row": lambda n, most, g: torch.where(torch.arange(n) == n // 2, most, 0),
}


@dataclass(frozen=True)
class Case:
    """Sparse rows, a matrix beside the rows and one beside the columns."""

    name: str
    shape: tuple[int, int, int]  # rows, width, d
    most: int = 5  # entries of a row
    counts: str = "mixed"
    room: int = 3  # slots behind the last entry
    heavy: bool = False  # every row has an entry in column 1
    holes: bool = False  # some entries have column -1
    layout: str = "dense"
    values: torch.dtype | None = None  # their type, where it is not that of the matrices
    other: torch.dtype | None = None  # that of the rows of `sparse_dots`
    given: torch.dtype | None = None  # that is asked for
    bias: bool = True

    def places(self) -> tuple[Tensor, Tensor]:
        """Row pointers and columns."""
        row_ptr, columns = self.drawn
        return row_ptr.clone(), columns.clone()

    @cached_property
    def drawn(self) -> tuple[Tensor, Tensor]:
        """Both, row by row, which takes a second where there are thousands."""
        n, width, _ = self.shape
        g = torch.Generator().manual_seed(5)
        counts = COUNTS[self.counts](n, min(self.most, width), g)
        chosen = []
        for count in counts.tolist():
            columns = torch.randperm(width, generator=g)[:count]
            if self.heavy and count and 1 not in columns:
                columns[0] = 1
            chosen.append(columns.sort().values)
        columns = torch.cat([*chosen, torch.full((self.room,), -1)]).int()
        if self.holes:
            columns[::3] = -1
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), columns

    def numbers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, rows, weight and bias; slots of no entry have values that must not count."""
        n, width, d = self.shape
        g = torch.Generator().manual_seed(6)
        row_ptr, columns = self.places()
        values = torch.randn(len(columns), generator=g)
        values[int(row_ptr[-1]) :] = torch.nan
        rows, weight = (torch.randn(count, d, generator=g) for count in (n, width))
        double = dtype == torch.float64
        value_type = dtype if double else self.values or dtype
        other = dtype if double else self.other or dtype
        bias = torch.randn(d, generator=g).to(dtype)
        rows = lay_out(rows.to(other), self.layout)
        return values.to(value_type), rows, lay_out(weight.to(dtype), self.layout), bias

    def asked(self, dtype: torch.dtype) -> torch.dtype | None:
        return self.given and (dtype if dtype == torch.float64 else self.given)

    def decode(self, dtype: torch.dtype) -> tuple:
        values, _, weight, bias = self.numbers(dtype)
        return *self.places(), values, weight, bias if self.bias else None, self.asked(dtype)

    def decode_backward(self, dtype: torch.dtype) -> tuple:
        values, rows, weight, _ = self.numbers(dtype)
        return rows, *self.places(), values, weight

    def dots(self, dtype: torch.dtype) -> tuple:
        _, rows, weight, _ = self.numbers(dtype)
        return *self.places(), rows, weight, self.asked(dtype)

    def outer(self, dtype: torch.dtype) -> tuple:
        values, _, _, _ = self.numbers(dtype)
        rows = lay_out(self.numbers(dtype)[1].to(dtype), self.layout)
        return *self.places(), values, rows, self.shape[1], self.asked(dtype)

    def sums(self, dtype: torch.dtype) -> tuple:
        return *self.places(), self.numbers(dtype)[0], self.shape[1], self.asked(dtype)


SHAPES = [
    (0, 4, 5),
    (1, 1, 1),
    (2, 3, 0),
    (4, 0, 5),
    (3, 7, 16),
    (5, 9, 63),
    (7, 20, 64),
    (6, 11, 65),
    (9, 40, 130),
    (33, 50, 31),
]
LAYOUTS = ("wide_rows", "transposed", "every_second", "expanded")
STRIPS = Case("several_strips", (2100, 40, 200), most=3, heavy=True)
CASES = [
    *(Case("x".join(map(str, shape)), shape) for shape in SHAPES),
    *(Case(counts, (11, 30, 40), counts=counts) for counts in COUNTS if counts != "mixed"),
    *(Case(layout, (9, 25, 70), layout=layout) for layout in LAYOUTS),
    Case("no_room", (6, 12, 24), room=0),
    Case("holes", (20, 30, 50), most=12, holes=True),
    Case("heavy", (70, 12, 40), heavy=True),
    Case("no_bias", (5, 12, 24), bias=False),
    Case("float32_values", (6, 12, 72), values=torch.float32),
    Case("bfloat16_values", (6, 12, 72), values=torch.bfloat16),
    Case("float16_rows", (6, 12, 72), other=torch.float16),
    Case("gives_float32", (6, 12, 72), given=torch.float32),
    Case("gives_bfloat16", (6, 12, 72), given=torch.bfloat16),
    STRIPS,
    Case("wider_than_a_strip", (3, 6, 8300)),
    Case("groups", (12, 64, 33), most=23, counts="full"),
]
FEW = Case("few", (4, 6, 5), holes=False)
HOLES = Case("holes", (5, 7, 3), most=6, holes=True)
CHUNKS = Case("chunks", (530, 3, 20), most=2, counts="full", heavy=True)
INTERPRETED = [*(case for case in CASES if max(case.shape) < 70), CHUNKS]
LARGE = Case("threads", (9000, 300, 90), most=8, heavy=True)


def examples(arguments: Callable[..., tuple], learned: tuple[int, ...]) -> list[Example]:
    return [
        Example(
            case.name, lambda dtype, case=case: finite(arguments(case, dtype)), learned, learned
        )
        for case in (FEW, HOLES)
    ]


def finite(args: tuple) -> tuple:
    """The same without NaN in slots of no entry, which derivatives by differences cannot stand."""
    return tuple(
        each.nan_to_num() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in args
    )


OPERATORS = {
    "sparse_decode": examples(Case.decode, (2, 3, 4)),
    "sparse_decode_backward": examples(Case.decode_backward, ()),
    "sparse_dots": examples(Case.dots, (2, 3)),
    "sparse_outer": examples(Case.outer, (2, 3)),
    "sparse_column_sums": examples(Case.sums, (2,)),
}


def widened(args: tuple) -> tuple:
    """In float64, which is then what is asked for, too."""
    return tuple(torch.float64 if isinstance(each, torch.dtype) else each for each in doubled(args))


def kernel(name: str) -> Kernel:
    """The launcher of that name."""

    def load() -> Callable:
        return getattr(import_module("dreamreader.triton_kernels.sparse_product"), name)

    def few(dtype: torch.dtype) -> list[Case]:
        chosen = INTERPRETED[::-2] if dtype == torch.float32 else INTERPRETED[1::5]
        by_column = name in ("sparse_outer", "sparse_column_sums")  # where columns are in chunks
        return [case for case in chosen if by_column or case is not CHUNKS]

    return Kernel(
        load,
        few,
        device_cases=lambda dtype: [*CASES, LARGE],
        ulps=32,  # numpy, which interprets, rounds every product and every sum
        repeat=4,
    )


def operator(name: str, arguments: Callable[..., tuple], reference: Callable[..., Any]) -> Operator:
    def launch(kernel: Callable, args: tuple) -> list[Tensor]:
        """Kernels get dense tensors, and a result to fill in place of what says its size."""
        out = torch.full_like(reference(*args), torch.nan)
        given = [each for each in args[:-1] if not isinstance(each, int)]
        kernel(*(each if each is None else each.contiguous() for each in given), out)
        return [out]

    return Operator(
        name,
        cases=lambda dtype: CASES,
        arguments=arguments,
        reference=reference,
        widened=widened,
        large=[LARGE, STRIPS],
        launch=launch,
        triton=kernel(name),
    )


TESTED = [
    operator("sparse_decode", Case.decode, sparse_decode_reference),
    Operator(
        "sparse_decode_backward",
        lambda dtype: CASES,
        Case.decode_backward,
        sparse_decode_backward_reference,
        large=[LARGE, STRIPS],
    ),
    operator("sparse_dots", Case.dots, sparse_dots_reference),
    operator("sparse_outer", Case.outer, sparse_outer_reference),
    operator("sparse_column_sums", Case.sums, sparse_column_sums_reference),
]
