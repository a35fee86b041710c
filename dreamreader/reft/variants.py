"""The variants of a learned low-rank edit: from their parameters to the tables of the edit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import orthonormal
from dreamreader.ops.low_rank import MAX_RANK

Parameters = dict[str, Tensor]
Tables = tuple[Tensor, Tensor, Tensor]
"""down [n, r, d], bias [n, r] and up [n, r, d] of x + U'(A x + b)."""

INITS = ("identity", "pyreft", "zero")


@dataclass(frozen=True)
class Variant:
    """One way to write an edit.

    Attributes:
        name: as users say it. formula: in words of its parameters.
        tables: from parameters to tables; stays differentiable.
        names: parameters.
        per_channel: has a number for each channel instead of a rank.
    """

    name: str
    formula: str
    tables: Callable[[Parameters], Tables]
    names: tuple[str, ...]
    per_channel: bool = False


def _loreft(p: Parameters) -> Tables:
    rotation = orthonormal(p["rotation"])
    return p["weight"] - rotation, p["bias"], rotation


def _direft(p: Parameters) -> Tables:
    return p["weight"], p["bias"], orthonormal(p["rotation"])


def _noreft(p: Parameters) -> Tables:
    return p["weight"] - p["projection"], p["bias"], p["projection"]


def _diagonal(p: Parameters) -> Tables:
    scale = p["scale"].unsqueeze(-2)
    return scale, scale.new_zeros(scale.shape[:-1]), p["shift"].unsqueeze(-2)


def _shift(p: Parameters) -> Tables:
    up = p["shift"].unsqueeze(-2)
    return torch.zeros_like(up), up.new_ones(up.shape[:-1]), up


VARIANTS: dict[str, Variant] = {
    each.name: each
    for each in (
        Variant("loreft", "h + R'(W h + b - R h)", _loreft, ("rotation", "weight", "bias")),
        Variant("direft", "h + R'(W h + b)", _direft, ("rotation", "weight", "bias")),
        Variant("noreft", "h + P'(W h + b - P h)", _noreft, ("projection", "weight", "bias")),
        Variant("diagonal", "h + a h + c", _diagonal, ("scale", "shift"), per_channel=True),
        Variant("bias", "h + c", _shift, ("shift",), per_channel=True),
    )
}


def variant_of(name: str) -> Variant:
    """The variant of a name.

    `loreft`, `direft` and `noreft` are those of the ReFT paper (`noreft`: rows of P are free),
    `diagonal` is representation editing with a scale and a shift for each channel.

    Raises:
        UnknownName: there is no such variant.

    Reference:
        Wu et al., ReFT (2404.03592), equations 2 and 3 and appendix; Wu et al., Advancing
        Parameter Efficiency in Fine-tuning via Representation Editing (2402.15179), equation 2.
    """
    if name not in VARIANTS:
        raise UnknownName("variant", name, VARIANTS)
    return VARIANTS[name]


def initial(
    name: str, init: str, stack: int, rank: int, width: int, generator: torch.Generator
) -> dict[str, Float[Tensor, "stack ..."]]:
    """Parameters to begin with, float32 on the CPU.

    Args:
        name: of the variant.
        init: `identity` changes nothing, bit for bit (W = R and b = 0; direft: W = 0); `pyreft`
            draws W and b as `nn.Linear` does, so that training begins away from the model; `zero`
            begins with W = 0 and b = 0, which loreft turns into h - R'R h. A scale and a shift for
            each channel always begin at 0.
        stack: adapters of the same shape, one for each step. rank, width: their shape.
        generator: draws.

    Raises:
        UnknownName: there is no such variant or initialisation.
        InvalidInput: the rank is not from 1 to the width, or above 256.
    """
    variant = variant_of(name)
    if init not in INITS:
        raise UnknownName("initialisation", init, INITS)
    if variant.per_channel:
        return {each: torch.zeros(stack, width) for each in variant.names}
    if not 1 <= rank <= min(width, MAX_RANK):
        most = f"the width, {width}," if width <= MAX_RANK else str(MAX_RANK)
        raise InvalidInput(f"rank {rank}: from 1 to {most} is possible")
    rows = orthonormal(torch.randn(stack, rank, width, generator=generator))
    found = {variant.names[0]: rows}
    weight, bias = torch.zeros(stack, rank, width), torch.zeros(stack, rank)
    if init == "pyreft":
        reach = width**-0.5
        weight.uniform_(-reach, reach, generator=generator)
        bias.uniform_(-reach, reach, generator=generator)
    elif init == "identity" and name != "direft":
        weight = rows.clone()
    return found | {"weight": weight, "bias": bias}
