"""Cases of encoding and selecting at once, of whole numbers, whose products every type has."""

from dataclasses import dataclass

import torch

from dreamreader.ops import encode_select_reference
from tests.cases._example import Example
from tests.cases._matrices import identical
from tests.cases._operator import Operator, gather, triton_of


@dataclass(frozen=True)
class Case:
    """Rows, features and latents; what is kept; the share of latents in the pool."""

    shape: tuple[int, int, int]
    rule: str
    count: int = 0
    pool: float | None = None
    bias: bool = True
    each: bool = False  # a threshold for each latent
    whole: bool = True  # numbers
    odd: float = 0.0  # a value somewhere in the rows
    slots: int | None = None

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.rule}-{self.count}-{self.pool}-{self.bias}-{self.odd}"

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        g = torch.Generator().manual_seed(5)
        rows, d, width = self.shape

        def draw(*shape: int) -> torch.Tensor:
            if self.whole:
                return torch.randint(-3, 4, shape, generator=g).to(dtype)
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

        x, weight, bias = draw(rows, d), draw(width, d), draw(width) if self.bias else None
        if self.odd:
            x[rows // 2, d // 2] = self.odd
        pool = None
        if self.pool is not None:
            pool = (
                torch.randperm(width, generator=g)[: round(self.pool * width)].sort().values.int()
            )
        threshold = None
        if self.rule == "threshold":
            threshold = torch.randn(width, generator=g) * 4 if self.each else torch.tensor(2.0)
        slots = rows * width if self.slots is None else self.slots
        return x, weight, bias, self.rule, self.count, pool, threshold, slots


RULES = [("topk", 3), ("batch_topk", 20), ("threshold", 0)]
CASES = [
    *(
        Case(shape, rule, count)
        for shape in [(0, 4, 9), (1, 1, 1), (7, 5, 33), (30, 8, 500), (3, 0, 70), (3, 4, 0)]
        for rule, count in RULES
    ),
    *(Case((9, 6, 200), rule, count, pool) for rule, count in RULES for pool in (0.0, 0.3, 1.0)),
    *(Case((9, 6, 200), rule, count, bias=False) for rule, count in RULES),
    *(Case((9, 6, 200), rule, count, odd=torch.nan) for rule, count in RULES),
    *(Case((9, 6, 200), rule, count, odd=torch.inf) for rule, count in RULES),
    *(Case((9, 6, 200), rule, count) for rule in ("topk", "batch_topk") for count in (0, 1, 5000)),
    Case((9, 6, 200), "threshold", each=True),
    Case((9, 6, 200), "threshold", each=True, pool=0.4),
    Case((9, 6, 200), "threshold", slots=10),
]
LARGE = [
    Case((700, 8, 12_000), rule, count, pool)
    for rule, count in (("topk", 20), ("batch_topk", 9000), ("threshold", 0))
    for pool in (None, 0.9)
]
OPERATORS = {
    "encode_select": [
        Example(
            rule,
            Case((4, 3, 8), rule, count, pool, whole=False, slots=20).arguments,
            learned=(0, 1, 2),
            twice=(0, 1, 2),
        )
        for (rule, count), pool in zip(RULES, (None, 0.8, None), strict=True)
    ]
}
INTERPRETED = [
    *(
        Case(shape, *rule)
        for shape in ((0, 4, 9), (1, 1, 1), (3, 0, 20), (3, 4, 0))
        for rule in RULES
    ),
    *(Case((3, 6, 70), *rule, pool) for rule in RULES for pool in (None, 0.0, 0.3, 1.0)),
    *(Case((3, 6, 70), *rule, bias=False, odd=torch.nan) for rule in RULES),
    *(Case((3, 6, 70), *rule, odd=torch.inf) for rule in RULES),
    *(Case((3, 6, 70), rule, count) for rule in ("topk", "batch_topk") for count in (0, 1, 500)),
    Case((3, 6, 70), "threshold", each=True, pool=0.4),
    Case((3, 6, 70), "threshold", slots=10),
]
TESTED = [
    Operator(
        "encode_select",
        cases=lambda dtype: CASES,
        arguments=Case.arguments,
        reference=encode_select_reference,
        judge=identical,
        widened=lambda args: args,
        launch=gather,
        triton=triton_of("dreamreader.ops.encode_select", INTERPRETED),
        large=LARGE,
    )
]
