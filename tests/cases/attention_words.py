"""Cases of the attention maps of words: shapes, memory layouts, masks and adversarial values."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dreamreader.ops import attention_words_reference_
from tests.cases._example import Example
from tests.cases._operator import Kernel, Operator
from tests.twin import attention_words as twin


class Sizes(NamedTuple):
    """Extents of one call."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    words: int


class Operands(NamedTuple):
    """What a call reads, in the order of the operator."""

    query: Tensor
    key: Tensor
    weights: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


@dataclass(frozen=True)
class Case:
    """One call."""

    name: str
    sizes: Sizes
    layout: str = "tokens"
    values: str = "normal"
    weights: str = "tokens"
    mask: str | None = None
    causal: bool = False
    scale: float | None = None
    factor: float = 1.0  # of the sums so far; from 0 the sums are small, and so is what is allowed

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Those of the operator."""
        return self.out(dtype, self.factor), *self.operands(dtype)

    def operands(self, dtype: torch.dtype) -> Operands:
        """The operands in a dtype; weights in its arithmetic type."""
        g = torch.Generator().manual_seed(1)
        batch, heads, key_heads, queries, keys, width, _ = self.sizes
        query = torch.randn(batch, heads, queries, width, generator=g)
        key = torch.randn(batch, key_heads, keys, width, generator=g)
        put(self.values, query, key)
        weights = weights_of(self, g).to(arithmetic(dtype))
        mask = mask_of(self, g)
        if mask is not None:
            mask = mask.expand(batch, heads, queries, keys)
        scale = max(width, 1) ** -0.5 if self.scale is None else self.scale
        laid = (lay_out(each.to(dtype), self.layout) for each in (query, key))
        return Operands(*laid, weights, mask, self.causal, scale)

    def out(self, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """Sums so far [batch, heads, words, queries], in the layout of the case."""
        s = self.sizes
        noise = torch.randn(
            s.batch, s.heads, s.words, s.queries, generator=torch.Generator().manual_seed(2)
        )
        return lay_out(factor * noise.to(arithmetic(dtype)), self.layout)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of out and weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values [batch, heads, rows, width] in other memory."""
    batch, heads, rows, width = x.shape
    match layout:
        case "dense":
            return x
        case "tokens":  # heads as parts of the features of a token
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "unaligned":  # cut from a larger tensor, one element in
            wide = x.new_full((batch, heads, rows + 1, width + 3), torch.nan)
            wide[:, :, :rows, 1 : width + 1] = x
            return wide[:, :, :rows, 1 : width + 1]
        case "every_second":  # no dense dimension
            wide = x.new_full((batch, heads, rows, 2 * width), torch.nan)
            wide[..., ::2] = x
            return wide[..., ::2]
    raise AssertionError(layout)


def put(values: str, query: Tensor, key: Tensor) -> None:
    """Turns normal values into adversarial ones, in place."""
    match values:
        case "zero":
            query.zero_()
        case "equal":
            query.fill_(1)
            key.fill_(0.5)
        case "giant":
            query[:, :, ::3] *= 300
        case "tiny":
            query *= 1e-20
        case "nan":
            query[0, 0, 1, 2] = torch.nan
            key[-1, -1, 3, 0] = torch.nan
        case "inf":
            query[0, 0, 1, 2] = torch.inf
            key[-1, -1, 3, 0] = -torch.inf


def weights_of(case: Case, g: torch.Generator) -> Tensor:
    """[batch or 1, words, keys]."""
    batch, *_, keys, _, words = case.sizes
    noise = torch.randn(batch, words, keys, generator=g)
    match case.weights:
        case "tokens":  # each word the mean of two tokens, the last word without any
            place = torch.arange(keys)
            return torch.stack(
                [
                    0.5 * ((place // 2 == 2 * word) & (word < max(words - 1, 1)))
                    for word in range(words)
                ]
                or [torch.zeros(keys)]
            )[None, :words]
        case "pairs":  # each word the mean of two tokens
            place = torch.arange(keys)
            return torch.stack([0.5 * (place // 2 == 1 + word) for word in range(words)])[None]
        case "each":  # every token a word
            return torch.eye(keys)[None, :words].contiguous()
        case "dense":
            return noise
        case "per_entry":  # other tokens in every batch entry, none in the first
            noise = torch.where(torch.rand(noise.shape, generator=g) < 0.3, noise, 0)
            noise[0] = 0
            return noise
        case "transposed":
            return noise.transpose(1, 2).contiguous().transpose(1, 2)
    raise AssertionError(case.weights)


def mask_of(case: Case, g: torch.Generator) -> Tensor | None:
    """Broadcasts to [batch, heads, queries, keys]."""
    batch, heads, _, queries, keys, *_ = case.sizes
    chosen = torch.rand(batch, heads, queries, keys, generator=g) < 0.7
    match case.mask:
        case None:
            return None
        case "bool":
            return chosen
        case "padding":  # the same keys for all queries
            return chosen[:, :1, :1]
        case "nothing":  # no key at all for every second query
            return chosen & (torch.arange(queries)[:, None] % 2 == 0)
        case "added":
            return torch.randn(chosen.shape, generator=g)
        case "added_bf16":
            return torch.randn(1, heads, queries, keys, generator=g).bfloat16()
        case "added_f16":
            return torch.randn(1, 1, 1, keys, generator=g).half()
        case "added_inf":
            return torch.where(chosen, 0.0, -torch.inf)[:, :, :1]
    raise AssertionError(case.mask)


TEXT = Sizes(2, 4, 2, 70, 77, 40, 3)  # two heads share a key head
LONG = Sizes(1, 2, 1, 70, 300, 24, 3)  # more keys than are held at once
SMALL = Sizes(2, 2, 1, 40, 21, 11, 3)
SIZES = {
    "one_element": Sizes(1, 1, 1, 1, 1, 1, 1),
    "one_query": Sizes(3, 8, 2, 1, 77, 64, 4),
    "odd": Sizes(3, 3, 1, 31, 13, 7, 2),
    "tile": Sizes(1, 1, 1, 32, 24, 16, 2),
    "above_tile": Sizes(1, 2, 2, 65, 81, 17, 2),
    "wide": Sizes(1, 1, 1, 33, 20, 160, 2),
    "held": Sizes(1, 1, 1, 20, 256, 16, 2),
    "windows": Sizes(1, 2, 1, 40, 1100, 16, 3),
    "no_batch": Sizes(0, 2, 2, 4, 5, 8, 2),
    "no_heads": Sizes(2, 0, 0, 4, 5, 8, 2),
    "no_queries": Sizes(2, 2, 2, 0, 5, 8, 2),
    "no_keys": Sizes(2, 2, 2, 4, 0, 8, 2),
    "no_width": Sizes(1, 2, 2, 4, 5, 0, 2),
    "no_words": Sizes(2, 2, 2, 4, 5, 8, 0),
}
LAYOUTS = ("dense", "unaligned", "every_second")
MASKS = ("bool", "padding", "nothing", "added", "added_inf")
VALUES = ("zero", "equal", "giant", "tiny", "nan", "inf")

CASES = [
    Case("text", TEXT),
    Case("long", LONG),
    *(Case(name, sizes) for name, sizes in SIZES.items()),
    *(Case(f"{layout}-{n}", s, layout) for layout in LAYOUTS for n, s in enumerate((TEXT, LONG))),
    *(Case(f"values-{each}", SMALL, values=each) for each in VALUES),
    *(Case(f"values-{each}-bool", SMALL, values=each, mask="bool") for each in ("nan", "inf")),
    *(Case(f"mask-{each}", TEXT, mask=each) for each in MASKS),
    *(Case(f"mask-{each}-long", LONG, mask=each, causal=each == "bool") for each in MASKS),
    *(Case(f"mask-{each}-strided", SMALL, "every_second", mask=each) for each in MASKS),
    Case("causal", TEXT, causal=True),
    Case("causal-long", Sizes(1, 2, 1, 290, 300, 8, 3), causal=True),
    Case("causal-nothing", SMALL, causal=True, mask="nothing"),
    Case("each-token", Sizes(1, 1, 1, 33, 77, 16, 77), weights="each"),
    Case("each-token-long", Sizes(1, 1, 1, 20, 300, 8, 40), weights="each"),
    Case("dense", SMALL, weights="dense"),
    Case("dense-long", Sizes(1, 1, 1, 33, 520, 16, 35), weights="dense", mask="padding"),
    Case("per_entry", TEXT, weights="per_entry"),
    Case("per_entry-long", Sizes(2, 1, 1, 33, 600, 8, 3), weights="per_entry"),
    Case("transposed", SMALL, weights="transposed"),
    *(Case(f"scale{scale}", SMALL, scale=scale) for scale in (2.0, -0.5, 0.0)),
    Case("scale-0.5-added", TEXT, scale=-0.5, mask="added"),
]
# An added mask in low precision goes with queries in it.
HALF = {
    torch.bfloat16: Case("mask-added_bf16", TEXT, mask="added_bf16"),
    torch.float16: Case("mask-added_f16", TEXT, mask="added_f16"),
}

CALLS = (
    Case("few", Sizes(2, 2, 1, 4, 5, 3, 2)),
    Case("few-added", Sizes(2, 2, 1, 4, 5, 3, 2), "dense", mask="added"),
    Case("few-causal", Sizes(2, 2, 1, 4, 5, 3, 2), causal=True),
    Case("few-bool", Sizes(2, 2, 1, 4, 5, 3, 2), mask="bool"),
)
OPERATORS = {"attention_words_": [Example(case.name, case.arguments) for case in CALLS]}


def cases_for(dtype: torch.dtype) -> list[Case]:
    return CASES + ([HALF[dtype]] if dtype in HALF else [])


def both_factors(dtype: torch.dtype) -> list[Case]:
    return [replace(case, factor=f) for case in cases_for(dtype) for f in (1.0, 0.0)]


def alternating(dtype: torch.dtype) -> list[Case]:
    """All in float32, a third in half precision, every second with sums from 0."""
    cases = cases_for(dtype)
    some = cases if dtype == torch.float32 else [*cases[::3], cases[-1]]
    return [replace(case, factor=float(number % 2)) for number, case in enumerate(some)]


def fewer_heads(dtype: torch.dtype) -> list[Case]:
    """Two of three, and fewer in half precision, with two heads; of one where there are more keys
    than are held at once."""

    def fewer(sizes: Sizes) -> Sizes:
        most = 1 if sizes.keys > 256 else 2
        heads, shared = min(sizes.heads, most), sizes.key_heads < sizes.heads
        key_heads = min(1 if shared else sizes.key_heads, heads)
        return sizes._replace(heads=heads, key_heads=key_heads)

    cases = alternating(dtype)
    few = [case for number, case in enumerate(cases) if number % 3 != 1]
    some = few if dtype == torch.float32 else [*cases[::3], cases[-1]]
    return [replace(case, sizes=fewer(case.sizes)) for case in some]


def idle(args: tuple, value: Tensor) -> Tensor:
    """Words without tokens; to them +0 is added."""
    words = ~(args[3] != 0).any(-1).expand(value.shape[0], -1)  # [batch, words]
    return value.transpose(1, 2)[words] + 0.0


def launches(case: Case) -> tuple[int, ...]:
    return (int(all((*case.sizes[:2], *case.sizes[3:5], case.sizes.words))),)


def triton_kernel() -> Callable:
    from dreamreader.triton_kernels.attention_words import attention_words

    return attention_words


TESTED = [
    Operator(
        "attention_words_",
        cases=both_factors,
        arguments=Case.arguments,
        reference=attention_words_reference_,
        idle=idle,
        large=[Case("threads", TEXT._replace(queries=500))],
        twin=Kernel(twin.build, alternating, repeat=8, launches=launches),
        triton=Kernel(triton_kernel, fewer_heads, device_cases=cases_for, repeat=8),
        device_cases=cases_for,
    )
]
