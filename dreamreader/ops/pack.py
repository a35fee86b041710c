"""Packing: chosen rows of an activation, converted and laid one after the other in given memory."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops._types import FLOATS

POOLS = ("none", "mean", "max")
# As `Stored` in csrc/pack.h.
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
MOST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # the largest number of types with a scale


def pack(
    x: Float[Tensor, "entries tokens features"],
    places: Int[Tensor, "places 2"],
    *,
    minus: Float[Tensor, "entries tokens features"] | None = None,
    groups: Int[Tensor, " rows_plus_1"] | None = None,
    pool: str = "none",
    out: Shaped[Tensor, "rows features"],
    scales: Float[Tensor, " rows"] | None = None,
    not_finite: Int[Tensor, " 1"] | None = None,
) -> Shaped[Tensor, "rows features"]:
    """Writes chosen rows of x, or pools of them, into `out`, rounded once to its type.

    Formula: out[r] = pool over the places p of row r: x[p] - minus[p]; float8_e4m3fn and int8
        store value / scales[r], scales[r] = the largest finite |value| of the row / 448 or 127, 1
        where that is 0. Differences and pools in float32 (float64 for float64 x); to nearest even.

    Args:
        x: activation of any strides, float16, bfloat16, float32 or float64; without gradient here.
        places: int32, entry and token of every row that is read.
        minus: what is subtracted, with the shape and type of x.
        groups: with a pool, int32 and increasing: row r pools the places groups[r] ..
            groups[r + 1] - 1, at least one.
        pool: "none" (a row for each place), "mean" or "max" (NaN if one is).
        out: dense; float32, bfloat16, float16, float8_e4m3fn or int8. NaN becomes NaN, in int8 0;
            infinities stay in the first three types and become the largest number in the others.
        scales: float32, for float8_e4m3fn and int8.
        not_finite: int64; rows are added to it that have a value that is not finite, or that
            becomes infinite in `out`.

    Returns:
        `out` itself.

    Raises:
        InvalidInput: a tensor has another shape, dtype, layout or device, a place is outside x, a
            group is empty or outside places, or groups or scales are missing or too many. On a
            CUDA device the values of places and groups are looked at, which waits for the device.

    Example:
        >>> import torch
        >>> x = torch.arange(8.0).reshape(1, 4, 2)
        >>> places = torch.tensor([[0, 3], [0, 1]], dtype=torch.int32)
        >>> pack(x, places, out=torch.empty(2, 2))
        tensor([[6., 7.],
                [2., 3.]])
    """
    _check(x, places, minus, groups, pool, out, scales, not_finite)
    minus = None if minus is None else minus.detach()
    _pack(out, scales, not_finite, x.detach(), places, minus, groups, POOLS.index(pool))
    return out


def pack_reference(
    out: Tensor,
    scales: Tensor | None,
    not_finite: Tensor | None,
    x: Tensor,
    places: Tensor,
    minus: Tensor | None,
    groups: Tensor | None,
    pool: int,
) -> None:
    """The definition of `pack` in plain torch, on any device.

    Args:
        out: [R, D]. scales: float32 [R]. not_finite: int64 [1].
        x: [B, T, D]. places: int32 [P, 2]. minus: [B, T, D]. groups: int32 [R + 1].
        pool: number in POOLS.
    """
    _check_values(x, places, groups)
    if out.numel() == 0:
        if scales is not None:
            scales.fill_(1)
        return
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    entries, tokens = places.long().unbind(1)
    values = x[entries, tokens].to(work)  # [P, D]
    if minus is not None:
        values = values - minus[entries, tokens].to(work)
    odd = ~values.isfinite().all(1)  # [P], then [R]
    if groups is not None:
        bounds = groups.tolist()
        parts = [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
        odd = torch.stack([odd[part].any() for part in parts])
        pooled = torch.mean if POOLS[pool] == "mean" else torch.amax
        values = torch.stack([pooled(values[part], 0) for part in parts]) + 0.0  # zeros are +0
    if out.dtype in MOST:
        assert scales is not None
        stored, scale = _scale_rows(values, out.dtype)
        scales.copy_(scale)
    else:
        stored = _round_once(values, out.dtype)
        odd |= ~stored.isfinite().all(1)
    out.copy_(stored)
    if not_finite is not None:
        not_finite += (odd | ~values.isfinite().all(1)).sum()


def _scale_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values [R, D] in a type with a scale, and the scales [R]."""
    most = values.new_tensor(MOST[dtype])  # a tensor: a GPU would multiply by 1 / number
    finite = values.abs().where(values.isfinite(), 0).amax(1)
    scale = (finite / most).clamp(max=torch.finfo(torch.float32).max).float()
    scale = scale.where(scale != 0, 1)
    parts = (values / scale.unsqueeze(1).to(values.dtype)).clamp(-most, most)
    if dtype == torch.int8:
        return parts.nan_to_num(0).round().to(dtype), scale
    missing = parts.isnan()
    bits = _round_once(parts, dtype).view(torch.uint8).masked_fill(missing, 0x7F)
    return bits.view(dtype), scale


def _round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a narrower type, to nearest even once; torch would round float64 twice."""
    if values.dtype == torch.float32 or dtype == torch.float32:
        return values.to(dtype)
    nearest = values.float()
    beyond = nearest.double().abs() > values.abs()
    inexact = nearest.double() != values
    bits = nearest.view(torch.int32) - beyond.int()
    return torch.where(inexact, bits | 1, bits).view(torch.float32).to(dtype)


def _cpu(out: Tensor, scales, not_finite, x: Tensor, places, minus, groups, pool: int) -> None:
    _check_values(x, places, groups)
    memory, stored = _memory(out)
    _native.pack_cpu(memory, scales, not_finite, x, places, minus, groups, pool, stored, _threads())
    _mark_written(out, scales, not_finite)


def _cuda(out: Tensor, scales, not_finite, x: Tensor, places, minus, groups, pool: int) -> None:
    _check_values(x, places, groups)
    memory, stored = _memory(out)
    _native.pack_cuda(memory, scales, not_finite, x, places, minus, groups, pool, stored)
    _mark_written(out, scales, not_finite)


def _memory(out: Tensor) -> tuple[Tensor, int]:
    """What the kernels take: DLPack has no float8 in every torch."""
    f8 = out.dtype == torch.float8_e4m3fn
    return out.view(torch.uint8) if f8 else out, STORED.index(out.dtype)


def _mark_written(*tensors: Tensor | None) -> None:
    for each in tensors:
        if each is not None:
            _increment_version(each)


def _fake(out: Tensor, scales, not_finite, x: Tensor, places, minus, groups, pool: int) -> None:
    return None


def _check(x, places, minus, groups, pool, out, scales, not_finite) -> None:
    """Raises InvalidInput unless the tensors belong together."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        raise _misfit(
            f"x must be [entries, tokens, features] of floating point, got {_describe(x)}"
        )
    if pool not in POOLS:
        raise _misfit(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    if places.dtype != torch.int32 or places.dim() != 2 or places.shape[1] != 2:
        raise _misfit(f"places must be int32 [places, 2], got {_describe(places)}")
    if minus is not None and (minus.shape != x.shape or minus.dtype != x.dtype):
        raise _misfit(f"minus must be {_describe(x)} as x is, got {_describe(minus)}")
    rows = len(places)
    if pool != "none":
        if groups is None or groups.dtype != torch.int32 or groups.dim() != 1 or not len(groups):
            raise _misfit(f"pool {pool!r} needs int32 groups [rows + 1], got {_describe(groups)}")
        rows = len(groups) - 1
    elif groups is not None:
        raise _misfit("groups go with a pool of mean or max, got pool 'none'")
    if out.dtype not in STORED or out.shape != (rows, x.shape[2]):
        names = ", ".join(_name(each) for each in STORED)
        raise _misfit(f"out must be {[rows, x.shape[2]]} of {names}, got {_describe(out)}")
    if out.dtype in MOST:
        if scales is None or scales.dtype != torch.float32 or scales.shape != (rows,):
            wanted = f"{_name(out.dtype)} needs float32 scales [{rows}]"
            raise _misfit(f"{wanted}, got {_describe(scales)}")
    elif scales is not None:
        raise _misfit(f"scales go with float8_e4m3fn and int8, got out of {_name(out.dtype)}")
    if not_finite is not None and (not_finite.dtype != torch.int64 or not_finite.shape != (1,)):
        raise _misfit(f"not_finite must be int64 [1], got {_describe(not_finite)}")
    named = {"places": places, "minus": minus, "groups": groups, "out": out, "scales": scales}
    for name, each in (named | {"not_finite": not_finite}).items():
        if each is not None and each.device != x.device:
            raise _misfit(f"x is on {x.device}, {name} on {each.device}")
        if each is not None and name != "minus" and not each.is_contiguous():
            raise _misfit(f"{name} must be dense, got strides {list(each.stride())}")
        if each is not None and name != "minus" and each.requires_grad:
            raise _misfit(f"{name} requires grad, and what is packed has no gradient")


def _check_values(x: Tensor, places: Tensor, groups: Tensor | None) -> None:
    """Raises InvalidInput unless places are inside x and groups inside places.

    In the kernels, as no graph can hold it.
    """
    if len(places):
        most = places.cpu().numpy()
        for name, column, limit in (("entry", 0, x.shape[0]), ("token", 1, x.shape[1])):
            low, high = int(most[:, column].min()), int(most[:, column].max())
            if low < 0 or high >= limit:
                wrong = low if low < 0 else high
                raise _misfit(f"places name {name} {wrong}, x has {limit}")
    if groups is not None:
        bounds = groups.cpu().numpy()
        if bounds[0] < 0 or bounds[-1] > len(places):
            raise _misfit(
                f"groups reach from {bounds[0]} to {bounds[-1]}, there are {len(places)} places"
            )
        empty = (bounds[1:] <= bounds[:-1]).nonzero()[0]
        if len(empty):
            raise _misfit(f"groups must increase, row {empty[0]} has no place")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(value: Tensor | None) -> str:
    return "none" if value is None else f"{_name(value.dtype)} {list(value.shape)}"


def _misfit(text: str) -> InvalidInput:
    return InvalidInput(f"pack: {text}")


_native: Any = native()[0]
_threads = torch.get_num_threads
_increment_version = torch.autograd.graph.increment_version

_pack = register(
    "pack",
    "(Tensor(a!) out, Tensor(b!)? scales, Tensor(c!)? not_finite, Tensor x, Tensor places, "
    "Tensor? minus, Tensor? groups, int pool) -> ()",
    reference=pack_reference,
    fake=_fake,
    cpu=Kernel("pack_cpu", _cpu),
    cuda=Kernel("pack_cuda", _cuda),
)

__all__ = ["POOLS", "STORED", "pack", "pack_reference"]
