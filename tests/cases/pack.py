"""Cases of the packing: shapes around every tile, layouts of the activation, places and groups."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dreamreader.ops.pack import MOST, POOLS
from tests.cases._example import Example


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


def call(case: Case, stored: torch.dtype) -> Example:
    """The case, written in a type."""

    def arguments(dtype: torch.dtype) -> tuple:
        x, places, minus, groups = case.inputs(dtype)
        return *case.outputs(stored), x, places, minus, groups, case.pool_number

    return Example(f"{case.name}-{str(stored).removeprefix('torch.')}", arguments)


CALLS = (
    Case("rows", (2, 9, 6), 7, minus=True),
    Case("mean", (2, 9, 6), 7, pool="mean", layout="channels_first"),
)
OPERATORS = {
    "pack": [call(case, stored) for case in CALLS for stored in (torch.bfloat16, torch.int8)]
}
