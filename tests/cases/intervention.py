"""Cases of the intervention program: every kind, shape, memory layout and adversarial value."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamreader.ops import Instruction, Program, intervene_reference
from dreamreader.ops._types import FLOATS
from tests.cases._example import Example
from tests.cases._operator import Kernel, Operator
from tests.twin import intervention as twin

Make = Callable[["Case", torch.Generator], list[Instruction]]


@dataclass(frozen=True)
class Case:
    """One program on one activation."""

    name: str
    shape: tuple[int, int, int]  # rows, tokens, width
    make: Make
    layout: str = "dense"
    values: str = "normal"

    def program(self) -> Program:
        rows, tokens, width = self.shape
        instructions = self.make(self, torch.Generator().manual_seed(1))
        return Program(instructions, rows=rows, tokens=tokens, width=width)

    def input(self, dtype: torch.dtype) -> Tensor:
        """The activation [rows, tokens, width] in the memory layout of the case."""
        rows, tokens, width = self.shape
        noise = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(2))
        return lay_out(VALUES[self.values](noise).to(dtype), self.layout)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    rows, tokens, width = x.shape
    match layout:
        case "dense":
            return x
        case "nchw":  # a feature map [B, C, HW] seen as [B, HW, C]
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "unaligned":  # rows cut from a wider tensor, starting one element in
            wide = x.new_zeros(rows, tokens, width + 3)
            wide[..., 1 : width + 1] = x
            return wide[..., 1 : width + 1]
        case "every_second":  # no dense dimension
            wide = x.new_zeros(rows, tokens, 2 * width)
            wide[..., ::2] = x
            return wide[..., ::2]
        case "swapped":  # [T, B, D] seen as [B, T, D]
            return x.transpose(0, 1).contiguous().transpose(0, 1)
    raise AssertionError(layout)


def _with(positions: dict[int, float]) -> Callable[[Tensor], Tensor]:
    def put(x: Tensor) -> Tensor:
        flat = x.flatten()
        for at, value in positions.items():
            flat[at % len(flat)] = value
        return flat.view(x.shape)

    return put


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "zero": torch.zeros_like,
    "equal": torch.ones_like,
    "giant_row": lambda x: x * torch.where(torch.arange(x.shape[1])[:, None] == 1, 1e4, 1.0),
    "tiny": lambda x: x * 1e-6,
    "nan": _with({3: float("nan"), 40: float("nan")}),
    "inf": _with({5: float("inf"), 50: float("-inf")}),
}


def direction(case: Case, g: torch.Generator, channels: Tensor | None = None) -> Tensor:
    """A unit vector [width] within the channels."""
    v = torch.randn(case.shape[2], generator=g)
    v = v if channels is None else torch.where(channels, v, 0)
    return v / v.norm()


def subspace(case: Case, g: torch.Generator, count: int) -> Tensor:
    """Orthonormal rows [count, width]."""
    return torch.linalg.qr(torch.randn(case.shape[2], count, generator=g))[0].T.contiguous()


def soft(case: Case, g: torch.Generator) -> Tensor:
    """Strengths [rows, tokens] with zeros, ones and values in between and beyond."""
    chosen = torch.randint(0, 4, case.shape[:2], generator=g)
    return torch.tensor([0.0, 1.0, 0.5, -1.5])[chosen]


def scattered(case: Case, g: torch.Generator) -> Tensor:
    """About half of the channels, at least one."""
    channels = torch.rand(case.shape[2], generator=g) < 0.5
    channels[case.shape[2] // 2] = True
    return channels


def head(case: Case, g: torch.Generator) -> Tensor:
    """The second of four heads, or the only channel."""
    width = case.shape[2]
    at = torch.arange(width)
    return (at >= width // 4) & (at <= width // 2)


def patches(
    case: Case, g: torch.Generator, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Source and index of a patch."""
    source = torch.randn(5, case.shape[2], generator=g).to(dtype)
    return {"source": source, "index": torch.randint(0, 5, case.shape[:2], generator=g)}


def per_row(case: Case, g: torch.Generator) -> Tensor:
    return torch.randn(case.shape[0], generator=g)


KINDS: dict[str, Make] = {
    "steer": lambda c, g: [Instruction("steer", soft(c, g), vectors=direction(c, g))],
    "steer_constant": lambda c, g: [Instruction("steer", 2.0, vectors=direction(c, g))],
    "scale": lambda c, g: [Instruction("scale", soft(c, g), lo=per_row(c, g))],
    "clamp": lambda c, g: [Instruction("clamp", soft(c, g), lo=-0.5, hi=per_row(c, g).abs())],
    "clamp_above": lambda c, g: [Instruction("clamp", hi=0.25)],
    "clamp_component": lambda c, g: [
        Instruction("clamp_component", soft(c, g), vectors=direction(c, g), lo=-0.1, hi=0.2)
    ],
    "project": lambda c, g: [Instruction("project", soft(c, g), vectors=direction(c, g))],
    "project_one_sided": lambda c, g: [
        Instruction("project", soft(c, g), vectors=direction(c, g), one_sided=True)
    ],
    "fill": lambda c, g: [Instruction("fill", soft(c, g), vectors=direction(c, g))],
    "zero": lambda c, g: [Instruction("fill", vectors=torch.zeros(c.shape[2]))],
    "patch": lambda c, g: [Instruction("patch", soft(c, g), **patches(c, g))],
    "patch_bf16": lambda c, g: [Instruction("patch", **patches(c, g, torch.bfloat16))],
    "patch_f16": lambda c, g: [Instruction("patch", soft(c, g), **patches(c, g, torch.float16))],
    "patch_f64": lambda c, g: [Instruction("patch", soft(c, g), **patches(c, g, torch.float64))],
    "renorm": lambda c, g: [
        Instruction("steer", soft(c, g), vectors=direction(c, g)),
        Instruction("renorm", soft(c, g)),
    ],
    "renorm_twice": lambda c, g: [
        Instruction("scale", lo=3.0),
        Instruction("renorm", soft(c, g)),
        Instruction("fill", soft(c, g), vectors=direction(c, g), channels=head(c, g)),
        Instruction("renorm", channels=head(c, g)),
    ],
    "three": lambda c, g: [
        Instruction("steer", soft(c, g), vectors=direction(c, g)),
        Instruction("project", soft(c, g), vectors=direction(c, g)),
        Instruction("clamp", lo=-1.0, hi=1.0),
    ],
    "overwrite_last": lambda c, g: [
        Instruction("project", vectors=direction(c, g)),
        Instruction("fill", soft(c, g).clamp(0, 1).round(), vectors=direction(c, g)),
        Instruction("steer", 0.5, vectors=direction(c, g)),
    ],
    "empty": lambda c, g: [],
    "all_off": lambda c, g: [Instruction("steer", 0.0, vectors=direction(c, g))],
}


def masked(kind: str, choose: Callable[[Case, torch.Generator], Tensor]) -> Make:
    """One kind on a choice of channels."""

    def make(c: Case, g: torch.Generator) -> list[Instruction]:
        channels, s = choose(c, g), soft(c, g)
        extra = {
            "steer": {"vectors": direction(c, g, channels)},
            "scale": {"lo": per_row(c, g)},
            "clamp": {"lo": -0.25, "hi": 0.25},
            "clamp_component": {"vectors": direction(c, g, channels), "hi": 0.1},
            "project": {"vectors": direction(c, g, channels)},
            "fill": {"vectors": direction(c, g, channels)},
            "patch": patches(c, g),
            "renorm": {},
        }[kind]
        last = Instruction(kind, s, channels=channels, **extra)
        return [Instruction("scale", lo=1.5), last] if kind == "renorm" else [last]

    return make


def chain(c: Case, g: torch.Generator) -> list[Instruction]:
    """Steps without sums over channels, on tokens of their own each."""
    return [
        Instruction("fill", soft(c, g).clamp(0, 1).round(), vectors=direction(c, g)),
        Instruction("steer", soft(c, g), vectors=direction(c, g), channels=scattered(c, g)),
        Instruction("scale", lo=per_row(c, g)),
        Instruction("clamp", soft(c, g), lo=-0.5, hi=0.5),
    ]


def projection(count: int) -> Make:
    return lambda c, g: [Instruction("project", soft(c, g), vectors=subspace(c, g, count))]


# One tile and one either side: blocks hold 64 channels, groups 32 tokens.
SHAPES = {
    "one_element": (1, 1, 1),
    "one_row": (1, 1, 64),
    "odd": (3, 5, 123),
    "below_tile": (2, 31, 63),
    "tile": (1, 32, 64),
    "above_tile": (2, 33, 65),
    "wide": (1, 3, 1280),
    "no_rows": (0, 4, 8),
    "no_tokens": (2, 0, 8),
}
LAYOUTS = ("nchw", "unaligned", "every_second", "swapped")
MASKED = ("steer", "scale", "clamp", "clamp_component", "project", "fill", "patch", "renorm")


def many(kinds: Iterable[str], shape: tuple[int, int, int], **kw: str) -> list[Case]:
    """The kinds on one shape; the layout and the values are part of the name."""
    suffix = "".join(f"-{value}" for value in kw.values())
    return [Case(kind + suffix, shape, KINDS[kind], **kw) for kind in kinds]


ODD = ("three", "renorm", "patch", "fill", "clamp")
STRANGE = tuple(name for name in VALUES if name != "normal")
CHOICES = {"head": head, "scattered": scattered}
SUBSPACES = (2, 7, 8, 9, 64)

CASES = [
    *many(KINDS, (2, 33, 72)),
    *many(KINDS, (2, 33, 72), layout="nchw"),
    *(case for layout in LAYOUTS[1:] for case in many(KINDS, (3, 5, 123), layout=layout)),
    *(case for values in STRANGE for case in many(KINDS, (2, 9, 72), values=values)),
    *(case for v in STRANGE for case in many(ODD, (2, 9, 72), layout="nchw", values=v)),
    *(
        Case(f"{kind}-{name}-{layout}", (2, 33, 72), masked(kind, choose), layout)
        for kind in MASKED
        for name, choose in CHOICES.items()
        for layout in ("dense", "nchw")
    ),
    *(
        Case(f"three-{name}-{layout}", shape, KINDS["three"], layout)
        for name, shape in SHAPES.items()
        for layout in ("dense", "nchw")
    ),
    *(
        Case(f"{kind}-{name}-map", (2, 700, 9), masked(kind, choose), "nchw")  # two runs of tokens
        for kind in ("steer", "scale", "clamp", "fill")
        for name, choose in CHOICES.items()
    ),
    Case("overwrite_first-map", (2, 700, 9), chain, "nchw"),
    *(Case(f"subspace_{m}", (2, 33, 72), projection(m)) for m in SUBSPACES),
    *(Case(f"subspace_9-{layout}", (3, 5, 123), projection(9), layout) for layout in LAYOUTS),
]

FEW = (2, 3, 7)
CALLS = [
    *many([kind for kind in KINDS if kind not in ("empty", "all_off")], FEW),
    *many(("three", "patch", "renorm"), FEW, layout="nchw"),
    *(Case(f"{kind}-scattered", FEW, masked(kind, scattered)) for kind in MASKED),
    Case("subspace", FEW, projection(2)),
]


def call(case: Case) -> Example:
    """The operator with the tables of the case; in float64 the sources of its patches are too."""

    def arguments(dtype: torch.dtype) -> tuple:
        *tables, patches = case.program().tables(dtype)
        if dtype == torch.float64:
            patches = [each.double() if each.is_floating_point() else each for each in patches]
        return case.input(dtype), *tables, patches

    return Example(case.name, arguments, learned=(0, 2, 3, 6), twice=(0, 3, 6))


def live(case: Case) -> Example:
    """The operator by the number of a program, which this function keeps."""
    program = case.program()
    return Example(case.name, lambda dtype: (case.input(dtype), program.number))


def seen(case: Case) -> Example:
    """The same with a place for what it did to the values."""
    program = case.program()
    return Example(
        case.name,
        lambda dtype: (case.input(dtype), program.number, torch.zeros(2, dtype=torch.int32), 1),
    )


OPERATORS = {
    "intervene": [call(case) for case in CALLS],
    "intervene_": [Example(case.name, call(case).arguments) for case in CALLS[-12:-6]],
    "intervene_live_": [live(case) for case in CALLS[-12:-10]],
    "intervene_seen": [seen(case) for case in CALLS[-12:-10]],
}

# Programs and shapes for what the case list leaves out: 16-byte runs along channels and along
# tokens, blocks of several warps, several blocks along the channels, four rows at a time, and rows
# wider than the registers of a block.
PROGRAMS = {
    "steer": KINDS["steer"],
    "three": KINDS["three"],
    "renorm_twice": KINDS["renorm_twice"],
    "patch_bf16": KINDS["patch_bf16"],
    "overwrite_last": KINDS["overwrite_last"],
    "project_then_head": lambda c, g: [
        Instruction("project", vectors=direction(c, g)),
        Instruction("fill", vectors=torch.zeros(c.shape[2]), channels=head(c, g)),
    ],
    "fill-scattered": masked("fill", scattered),
    "project-scattered": masked("project", scattered),
    "subspace_9": projection(9),
}
SHAPES = [
    ((2, 3, 1280), "dense"),
    ((1, 6, 3072), "dense"),
    ((1, 2, 4104), "dense"),
    ((1, 2, 15360), "dense"),
    ((2, 3, 2001), "every_second"),
    ((1, 64, 320), "nchw"),
    ((2, 16, 1280), "nchw"),
    ((1, 40, 2560), "nchw"),
    ((1, 50, 200), "nchw"),
]
WIDE = [
    Case(f"{name}-{shape}", shape, make, layout)
    for shape, layout in SHAPES
    for name, make in PROGRAMS.items()
]


def wide_too(dtype: torch.dtype) -> list[Case]:
    return CASES + (WIDE if dtype in (torch.bfloat16, torch.float32) else [])


def twin_cases(dtype: torch.dtype) -> list[Case]:
    """All in float32; in bfloat16 the wide ones and a third of the others, elsewhere a few."""
    if dtype == torch.bfloat16:
        return CASES[::3] + WIDE
    return wide_too(dtype) if dtype == torch.float32 else CASES[::8]


def interpreted_cases(dtype: torch.dtype) -> list[Case]:
    """In float32 every kind on rows and on a feature map, and every third of the other cases."""
    if dtype == torch.float32:
        both = 2 * len(KINDS)
        return CASES[:both] + CASES[both::3]
    return CASES[::8] if dtype == torch.bfloat16 else CASES[4::16]


def triton_kernel() -> Callable:
    from dreamreader.triton_kernels.intervention import intervention

    return intervention


TESTED = [
    Operator(
        "intervene",
        cases=lambda dtype: CASES,
        arguments=lambda case, dtype: (case.input(dtype), *case.program().tables(dtype)),
        reference=intervene_reference,
        idle=lambda args, value: value[(args[2] == 0).all(0).expand(value.shape[:2])],
        aliased=True,
        large=[
            Case("threads-renorm", (2, 700, 320), KINDS["renorm"]),
            Case("threads-subspace", (2, 700, 320), projection(3)),
        ],
        twin=Kernel(
            twin.build,
            twin_cases,
            dtypes=FLOATS,
            repeat=3,
            launches=lambda case: (int(0 not in case.shape),),
        ),
        triton=Kernel(
            triton_kernel,
            interpreted_cases,
            device_cases=lambda dtype: CASES,
            dtypes=FLOATS,
            repeat=2,
        ),
        device_cases=wide_too,
    )
]
