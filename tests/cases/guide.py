"""Cases of probe guidance: layers, activations, steps, selections and layouts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamreader.ops.guide import guide_backward_reference, guide_reference
from tests.cases._example import Example
from tests.cases._operator import Kernel, Operator
from tests.cases.intervention import lay_out

SELECTIONS: dict[str, Callable[[int, int], Tensor]] = {
    "all": lambda b, t: torch.ones(1, 1),
    "none": lambda b, t: torch.zeros(1, 1),
    "rows": lambda b, t: (torch.arange(b) % 2).reshape(b, 1),
    "tokens": lambda b, t: (torch.arange(t) % 3 != 1).reshape(1, t),
    "soft": lambda b, t: torch.linspace(-1, 1, b * t).reshape(b, t),
    "last": lambda b, t: torch.arange(t) == t - 1,
}


@dataclass(frozen=True)
class Case:
    """A probe and the rows that it moves."""

    name: str
    shape: tuple[int, int, int]  # batch, tokens, width
    hidden: tuple[int, ...] = (24,)
    labels: int = 4
    activation: str = "relu"
    selection: str = "soft"
    layout: str = "dense"
    gamma: float = 1.0
    iterations: int = 1
    trust: float = torch.inf
    by_entry: bool = True  # the first bias and the coefficients

    def inputs(self, dtype: torch.dtype) -> tuple:
        """The arguments of `guide_reference`, with tables in the arithmetic type of dtype."""
        g = torch.Generator().manual_seed(7)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        batch, tokens, width = self.shape
        sizes = [width, *self.hidden, self.labels]
        weights = [
            torch.randn(o, i, generator=g) / max(i, 1) ** 0.5
            for i, o in zip(sizes, sizes[1:], strict=False)
        ]
        biases = [torch.randn(o, generator=g) * 0.3 for o in sizes[1:]]
        entries = batch if self.by_entry else 1
        biases[0] = biases[0] + torch.randn(entries, sizes[1], generator=g) * 0.3
        biases[0] = biases[0].expand(batch, -1).unsqueeze(1)
        c = torch.randn(entries, self.labels, generator=g).expand(batch, -1)
        strength = SELECTIONS[self.selection](batch, tokens).to(wide).expand(batch, tokens)
        x = lay_out(torch.randn(self.shape, generator=g).to(dtype), self.layout)
        tables = [each.to(wide) for each in weights], [each.to(wide) for each in biases]
        return x, *tables, self.activation, c.to(wide), strength, *self.numbers

    @property
    def numbers(self) -> tuple[float, int, float]:
        return self.gamma, self.iterations, self.trust


SHAPES = [(0, 3, 8), (2, 0, 8), (1, 1, 1), (1, 1, 9), (3, 5, 123), (2, 47, 64), (1, 97, 33)]
DEPTHS = {"linear": (), "one": (24,), "two": (40, 19)}
CASES = [
    *(Case(f"{b}x{t}x{d}", (b, t, d)) for b, t, d in SHAPES),
    *(
        Case(f"{name}-{activation}-{steps}", (2, 21, 40), hidden, 5, activation, iterations=steps)
        for name, hidden in DEPTHS.items()
        for activation in ("relu", "gelu", "silu")
        for steps in (1, 4)
        if hidden or activation == "relu"
    ),
    *(
        Case(f"{name}-trust_{trust}", (2, 21, 40), hidden, iterations=3, trust=trust)
        for name, hidden in DEPTHS.items()
        for trust in (0.0, 0.05, 4.0)
    ),
    *(Case(f"{name}-selection", (3, 19, 40), selection=name) for name in SELECTIONS),
    *(
        Case(layout, (3, 35, 50), (20, 20), layout=layout)
        for layout in ("nchw", "unaligned", "every_second", "swapped")
    ),
    Case("nchw-some", (2, 50, 40), layout="nchw", selection="tokens"),
    Case("fading", (2, 9, 40), (16, 16), gamma=0.5, iterations=5),
    Case("growing", (2, 9, 40), gamma=-1.2, iterations=3),
    Case("same_for_all", (3, 9, 40), by_entry=False),
    Case("wide_hidden", (1, 26, 300), (300, 130), iterations=2),
    Case("wide_enough_for_parts", (1, 13, 1111), (70,), iterations=2, trust=0.1),
    Case("wider_than_the_kernel", (1, 5, 20), (1030,)),
    Case("few_tokens_many_weights", (2, 3, 600), (450,), iterations=2),
    Case("one_label", (2, 9, 40), labels=1),
]

# The last one has so many weights and so few tokens that the kernel leaves it to plain torch.
CALLS = (
    Case("linear", (2, 3, 6), (), iterations=2, trust=0.3),
    Case("one", (2, 3, 6), (5,), activation="silu", iterations=2, trust=0.3),
    Case("two", (2, 3, 6), (5, 4), activation="gelu", iterations=3, gamma=0.7),
    Case("two-trust", (2, 3, 6), (5, 4), activation="silu", iterations=2, trust=0.05),
)
MANY_WEIGHTS = Case("many_weights", (1, 1, 2100), (128,), activation="silu", selection="all")
OPERATORS = {
    "guide": [
        *(Example(case.name, case.inputs, learned=(0,), twice=(0,)) for case in CALLS),
        Example(MANY_WEIGHTS.name, MANY_WEIGHTS.inputs),
    ],
    "guide_backward": [
        Example(case.name, lambda dtype, case=case: (noise(case, dtype), *case.inputs(dtype)))
        for case in CALLS[1:2]
    ],
}

LARGE = Case("units", (1, 40, 96), (256, 200), activation="gelu", iterations=2, trust=0.2)
FEW = [case for case in CASES if 0 not in case.shape and max(case.hidden, default=0) <= 256]


def noise(case: Case, dtype: torch.dtype) -> Tensor:
    """A gradient of the result."""
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(8)).to(dtype)


def triton_kernel() -> Callable:
    from dreamreader.triton_kernels.guide import guide

    return guide


TESTED = [
    Operator(
        "guide",
        cases=lambda dtype: CASES,
        arguments=lambda case, dtype: case.inputs(dtype),
        reference=guide_reference,
        idle=lambda args, value: value[args[5] == 0],
        large=[Case("threads", (2, 130, 64), (40, 24), iterations=3)],
        triton=Kernel(
            triton_kernel,
            lambda dtype: FEW[::2] if dtype == torch.float32 else FEW[1::8],
            device_cases=lambda dtype: [*FEW, LARGE],
            ulps=32,  # numpy, which interprets, rounds every product and every sum
        ),
    ),
    Operator(
        "guide_backward",
        cases=lambda dtype: CALLS,
        arguments=lambda case, dtype: (noise(case, dtype), *case.inputs(dtype)),
        reference=guide_backward_reference,
    ),
]
