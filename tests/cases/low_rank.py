"""Cases of the low-rank edit: ranks, shapes, memory layouts, adapters, strengths and values."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamreader.ops._low_rank_gpu import MAX_RANK
from dreamreader.ops.low_rank import low_rank_backward_reference, low_rank_reference
from tests.cases._compare import assert_close
from tests.cases._example import Example
from tests.cases._operator import Kernel, Operator, Results
from tests.cases.intervention import VALUES, lay_out
from tests.twin import low_rank as twin

Make = Callable[[int, int, torch.Generator], Tensor]

STRENGTHS: dict[str, Make] = {
    "one": lambda b, t, g: torch.ones(()).expand(b, t),
    "half": lambda b, t, g: torch.full((), 0.5).expand(b, t),
    "zero": lambda b, t, g: torch.zeros(()).expand(b, t),
    "per_entry": lambda b, t, g: torch.randn(b, 1, generator=g).expand(b, t),
    "per_token": lambda b, t, g: torch.tensor([0.0, 1.0, -1.5])[
        torch.randint(0, 3, (t,), generator=g)
    ].expand(b, t),
    "soft": lambda b, t, g: torch.tensor([0.0, 1.0, 0.5, -1.5])[
        torch.randint(0, 4, (b, t), generator=g)
    ],
}


@dataclass(frozen=True)
class Case:
    """One edit of one activation."""

    name: str
    shape: tuple[int, int, int]  # entries, tokens, width
    rank: int = 4
    layout: str = "dense"
    values: str = "normal"
    strength: str = "soft"
    adapters: int = 1
    index: tuple[int, ...] | None = None  # by entry

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x in the memory layout of the case, down, bias, up, strength and index."""
        entries, tokens, width = self.shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        g = torch.Generator().manual_seed(4)
        x = VALUES[self.values](torch.randn(self.shape, generator=g)).to(dtype)
        tables = torch.randn(2, self.adapters, self.rank, width, generator=g) / max(width, 1) ** 0.5
        down, up = tables.to(wide)
        bias = torch.randn(self.adapters, self.rank, generator=g).to(wide)
        strength = STRENGTHS[self.strength](entries, tokens, g).to(wide)
        index = torch.tensor(self.index or [0] * entries, dtype=torch.int64)
        return lay_out(x, self.layout), down, bias, up, strength, index

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """A gradient of the result, in the memory layout of the case."""
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(5))
        return lay_out(noise.to(dtype), self.layout)


RANKS = (1, 2, 3, 5, 8, 32, 64, 65, 200, 256)
# Blocks hold up to 64 rows, pieces 128, tiles 128 channels, four of them are one sum.
SHAPES = {
    "one_element": (1, 1, 1),
    "one_row": (1, 1, 64),
    "odd": (3, 5, 123),
    "above_tile": (1, 6, 129),
    "many_tiles": (1, 5, 517),
    "above_block": (1, 65, 40),
    "above_piece": (1, 131, 24),
    "single_tokens": (70, 1, 33),
    "no_rows": (0, 4, 8),
    "no_tokens": (2, 0, 8),
    "no_width": (2, 3, 0),
}
LAYOUTS = ("nchw", "unaligned", "every_second", "swapped")

CASES = [
    *(Case(f"rank_{rank}", (2, 9, 261), rank) for rank in RANKS),
    *(
        Case(f"{name}-{lay}", s, layout=lay)
        for name, s in SHAPES.items()
        for lay in ("dense", "nchw")
    ),
    *(Case(layout, (3, 37, 123), 5, layout) for layout in LAYOUTS),
    *(
        Case(f"{strength}-{layout}", (2, 33, 72), layout=layout, strength=strength)
        for strength in STRENGTHS
        for layout in ("dense", "nchw")
    ),
    *(
        Case(f"{values}-{layout}", (2, 33, 72), layout=layout, values=values)
        for values in VALUES
        for layout in ("dense", "nchw")
    ),
    Case("adapters", (5, 7, 40), 3, adapters=4, index=(2, 0, 2, 3, 0)),
    Case("adapters-nchw", (5, 70, 40), 3, "nchw", adapters=4, index=(3, 3, 1, 0, 1)),
    Case("adapter_each", (6, 1, 40), 3, adapters=6, index=(5, 4, 3, 2, 1, 0)),
    Case("adapter_of_pieces", (3, 150, 16), 3, adapters=2, index=(1, 0, 1)),
]

ALL = (True, True, True, True)
TWO = Case("two_adapters", (3, 3, 5), 2, adapters=2, index=(1, 0, 1))
MAP = Case("map", (3, 3, 5), 2, "nchw", adapters=2, index=(1, 0, 1))
OPERATORS = {
    "low_rank": [
        Example(case.name, case.inputs, learned=(0, 1, 2, 3, 4), twice=(0, 1, 2, 3))
        for case in (TWO, MAP)
    ],
    "low_rank_": [Example(case.name, case.inputs) for case in (TWO, MAP)],
    "low_rank_backward": [
        Example(str(needs), lambda dtype, needs=needs: (*gradient_inputs(TWO, dtype)[:-1], needs))
        for needs in (ALL, (False, True, False, True))
    ],
}

# What the case list leaves out: rows in runs of 16 bytes, several tiles, the widest rows, and parts
# of the sums.
LARGE = [
    Case("runs", (2, 17, 320), 8),
    Case("tiles_of_two_entries", (2, 40, 128), 20, adapters=2, index=(1, 0)),
    Case("tokens_in_runs", (1, 40, 96), 4, "nchw"),
    Case("widest", (1, 3, 8192), 2),
    Case("parts", (1, 150, 136), 9),
]
FEW = [case for case in CASES if case.rank <= MAX_RANK and 0 not in case.shape]
THREADS = Case("threads", (3, 500, 40), 5, adapters=2, index=(1, 0, 1))
# Sums over rows and ranks are smaller than their terms, and where they are few, the largest error
# of the reference is a matter of luck.
SUM_ULPS = 8


def gradient_inputs(case: Case, dtype: torch.dtype) -> tuple:
    return case.gradient(dtype), *case.inputs(dtype), ALL


def close_gradients(case: Case, got: Results, same: Results, exact: Results, ulps: int = 1) -> None:
    """The tolerance rule; one or two numbers may be exact in the reference by chance."""
    for number, each in enumerate(zip(got, same, exact, strict=True)):
        if case.shape[0] * case.shape[1] < 5 or each[0].numel() < 3:
            torch.testing.assert_close(*each[:2], equal_nan=True)
        else:
            assert_close(*each, ulps=max(ulps, SUM_ULPS if number else 1))


def launch_gradient(kernel: Callable, args: tuple) -> Results:
    """The kernels write into given memory."""
    grad, x, *tables, _ = args
    found = poisoned(grad, tables)
    kernel(grad, x, *tables, *found)
    return found


def poisoned(grad: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """Room for the gradients, NaN everywhere."""
    results = [torch.empty_like(grad), *(each.new_empty(each.shape) for each in tables[:4])]
    return [each.fill_(torch.nan) for each in results]


def some(float32: slice, other: slice, *more: Case) -> Callable[[torch.dtype], list[Case]]:
    """A part of the cases, another one in half precision."""
    return lambda dtype: FEW[float32] if dtype == torch.float32 else [*FEW[other], *more]


def triton_kernel(name: str) -> Callable:
    from dreamreader.triton_kernels import low_rank

    return getattr(low_rank, name)


def on_device(dtype: torch.dtype) -> list[Case]:
    return FEW + LARGE


def finite_on_device(dtype: torch.dtype) -> list[Case]:
    """A product in parts makes NaN of an infinity."""
    return [case for case in FEW + LARGE if case.inputs(dtype)[0].isfinite().all()]


ULPS = 32  # in float32 numpy, which interprets, rounds every product and every sum, unlike a GPU
TESTED = [
    Operator(
        "low_rank",
        cases=lambda dtype: CASES,
        arguments=lambda case, dtype: case.inputs(dtype),
        reference=low_rank_reference,
        idle=lambda args, value: value[args[4] == 0],
        aliased=True,
        large=[THREADS],
        twin=Kernel(
            lambda: twin.LowRankTwin().low_rank,
            some(slice(0, None, 2), slice(1, None, 8), *LARGE),
        ),
        triton=Kernel(
            lambda: triton_kernel("low_rank"),
            some(slice(0, None, 4), slice(1, None, 16), *LARGE[:3]),
            device_cases=finite_on_device,
            ulps=ULPS,
        ),
        device_cases=on_device,
    ),
    Operator(
        "low_rank_backward",
        cases=lambda dtype: CASES,
        arguments=gradient_inputs,
        reference=low_rank_backward_reference,
        judge=close_gradients,
        idle=lambda args, value: value[args[5] == 0],
        large=[THREADS],
        launch=launch_gradient,
        twin=Kernel(
            lambda: twin.LowRankTwin().backward,
            some(slice(1, None, 2), slice(0, None, 10), *LARGE[:-1]),
            launches=lambda case: (2, 3),
        ),
        triton=Kernel(
            lambda: triton_kernel("low_rank_backward"),
            some(slice(1, None, 5), slice(0, None, 16), LARGE[-1]),
            device_cases=finite_on_device,
            ulps=ULPS,
        ),
        device_cases=on_device,
    ),
]
