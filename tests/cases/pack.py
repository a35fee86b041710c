"""Cases of the packing: shapes around every tile, layouts of the activation, places and groups."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dreamreader.ops import pack_reference
from dreamreader.ops._types import FLOATS
from dreamreader.ops.pack import MOST, POOLS, STORED
from tests.cases._compare import assert_close
from tests.cases._example import Example
from tests.cases._operator import Kernel, Operator, Results
from tests.twin import pack as twin


class Outputs(NamedTuple):
    """The memory that is written into."""

    out: Tensor
    scales: Tensor | None
    not_finite: Tensor


@dataclass(frozen=True)
class Case:
    """Rows of an activation that are packed."""

    name: str
    shape: tuple[int, int, int]  # entries, tokens, features
    count: int  # places
    pool: str = "none"
    minus: bool = False
    layout: str = "dense"
    odd: bool = False  # some values are not finite, or large
    stored: torch.dtype = torch.bfloat16

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        x, places, minus, groups = self.inputs(dtype)
        return *self.outputs(self.stored), x, places, minus, groups, self.pool_number

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The activation in the layout of the case, places, what is subtracted, and groups."""
        g = torch.Generator().manual_seed(5)
        entries, tokens, _ = self.shape
        x = torch.randn(self.shape, generator=g, dtype=torch.float64)
        x *= torch.randn(self.shape[:2] + (1,), generator=g, dtype=torch.float64).mul(3).exp()
        if self.odd:
            for start, value in enumerate((torch.nan, torch.inf, -torch.inf, 7e4, -3.4e38, 1e-45)):
                x.view(-1)[start * 40 :: 331] = value
        minus = torch.randn(self.shape, generator=g).to(dtype) if self.minus else None
        columns = [
            torch.randint(0, max(limit, 1), (self.count,), generator=g)
            for limit in (entries, tokens)
        ]
        places = torch.stack(columns, 1).int()
        if minus is not None:
            minus = lay_out(minus, "dense" if self.layout == "expanded" else self.layout)
        return lay_out(x.to(dtype), self.layout), places, minus, self.groups()

    def groups(self) -> Tensor | None:
        """Bounds of groups of 1, 2, 3 ... places, and the rest."""
        if self.pool == "none":
            return None
        bounds, size = [0], 1
        while bounds[-1] + size < self.count:
            bounds.append(bounds[-1] + size)
            size += 1
        return torch.tensor([*bounds, self.count] if self.count else bounds, dtype=torch.int32)

    def outputs(self, dtype: torch.dtype) -> Outputs:
        """Memory that shows what was not written; `out` begins one element into its own."""
        groups = self.groups()
        rows = self.count if groups is None else len(groups) - 1
        size = rows * self.shape[2]
        out = torch.full((size + 2,), 72.0).to(dtype)[1 : size + 1].view(rows, self.shape[2])
        scales = torch.full((rows,), torch.nan) if dtype in MOST else None
        return Outputs(out, scales, torch.tensor([5]))

    @property
    def pool_number(self) -> int:
        return POOLS.index(self.pool)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    match layout:
        case "dense":
            return x
        case "channels_first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "cut":  # from wider rows, starting one element in
            wide = x.new_full((*x.shape[:2], x.shape[2] + 3), torch.nan)
            wide[..., 1 : x.shape[2] + 1] = x
            return wide[..., 1 : x.shape[2] + 1]
        case "every_second":
            wide = x.new_full((*x.shape[:2], 2 * x.shape[2]), torch.nan)
            wide[..., ::2] = x
            return wide[..., ::2]
        case "expanded":  # one entry, many times
            return x[:1].expand(x.shape)
        case "tokens_first":  # [tokens, entries, features], as some models keep it
            return x.transpose(0, 1).contiguous().transpose(0, 1)
    raise AssertionError(layout)


LAYOUTS = ("channels_first", "cut", "every_second", "expanded", "tokens_first")
CASES = [
    *(Case(f"{d}_features", (2, 9, d), 7) for d in (1, 3, 31, 32, 33, 64, 65, 127, 128, 513)),
    Case("no_place", (2, 9, 16), 0),
    Case("no_feature", (2, 9, 0), 4),
    Case("no_place-mean", (2, 9, 16), 0, pool="mean"),
    *(Case(layout, (3, 70, 40), 130, layout=layout) for layout in LAYOUTS),
    *(Case(f"{pool}", (2, 30, 129), 70, pool=pool) for pool in ("mean", "max")),
    *(
        Case(f"{pool}-{layout}-minus", (2, 90, 70), 100, pool, True, layout)
        for pool in POOLS
        for layout in LAYOUTS
    ),
    *(
        Case(f"{pool}-{layout}-odd", (2, 40, 72), 67, pool, minus, layout, odd=True)
        for pool, minus in (("none", False), ("none", True), ("max", False))
        for layout in ("dense", "channels_first")
    ),
    Case("mean-odd", (2, 40, 72), 67, "mean", odd=True),
    Case("wide", (1, 70, 1280), 66, layout="channels_first"),
    Case("threads", (2, 300, 260), 900),
]


CALLS = (
    Case("rows", (2, 9, 6), 7, minus=True),
    Case("mean", (2, 9, 6), 7, pool="mean", layout="channels_first"),
)
OPERATORS = {
    "pack": [
        Example(f"{case.name}-{stored}", replace(case, stored=stored).arguments)
        for case in CALLS
        for stored in (torch.bfloat16, torch.int8)
    ]
}


def every_type(cases: list[Case]) -> list[Case]:
    return [replace(case, stored=stored) for case in cases for stored in STORED]


def some_types(dtype: torch.dtype) -> list[Case]:
    """Each case in a few pairs of types, all pairs over the cases."""
    pairs = [(source, stored) for source in FLOATS for stored in STORED]
    return [
        replace(case, stored=stored)
        for number, case in enumerate(case for case in CASES if case.name != "threads")
        for source, stored in pairs[number % 4 :: 4]
        if source == dtype
    ]


def bits_of(t: Tensor) -> Tensor:
    """The bits, every NaN of a wider type alike."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]
    bits = t.contiguous().view(integer)
    return bits if t.element_size() == 1 else bits.masked_fill(t.isnan(), -1)


def judge(case: Case, got: Results, same: Results, exact: Results) -> None:
    """Equal bits; where a mean is rounded, the tolerance rule."""
    (mine, *_), (want, *_) = got, same
    assert torch.equal(got[-1], same[-1])  # values that are not finite
    if case.pool != "mean":
        assert torch.equal(bits_of(mine), bits_of(want))
        assert torch.equal(got[-2], same[-2]) or case.stored not in MOST
    elif case.stored not in MOST:
        assert_close(mine, want, exact[0].double())
    else:  # one unit of the row's largest number, which the scale is made of
        assert torch.allclose(got[1], same[1], rtol=1e-6)
        near = (mine.float() - want.float()).abs() <= want.float().abs().clamp(min=8) / 8
        assert (near | (mine.float().isnan() & want.float().isnan())).all()


def widened(args: tuple) -> tuple:
    """What is read in float64; what is written stays."""
    *outputs, x, places, minus, groups, pool = args
    return *outputs, x.double(), places, None if minus is None else minus.double(), groups, pool


TESTED = [
    Operator(
        "pack",
        cases=lambda dtype: every_type(CASES),
        arguments=Case.arguments,
        reference=pack_reference,
        judge=judge,
        widened=widened,
        large=[
            Case(f"threads-{pool}", (1, 900, 300), 800, pool, stored=torch.int8)
            for pool in ("none", "mean")
        ],
        twin=Kernel(
            twin.build,
            some_types,
            dtypes=FLOATS,
            repeat=8,
            launches=lambda case: (int(case.count > 0),),
        ),
        device_cases=lambda dtype: every_type([c for c in CASES if c.layout != "expanded"]),
    )
]
