"""One instruction on all rows, in plain torch: what every kernel is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamreader.ops._norm import row_norm
from dreamreader.ops.intervention_program import KINDS, Step


def apply_step(
    step: Step,
    y: Tensor,
    entry: Tensor,
    s: Tensor,
    vectors: Tensor,
    limits: Tensor,
    masks: Tensor,
    patches: Sequence[Tensor],
) -> Tensor:
    """The channels step.begin .. step.end - 1 after the step.

    Args:
        step: the packed instruction.
        y: [B, T, D], the rows before the step.
        entry: [B, T, D], the rows as the program found them.
        s: [B, T, 1], strengths.
        vectors: [V, D]. limits: [L, 2, B]. masks: bool [M, D].
        patches: source and index of each patch in turn.

    Returns:
        [B, T, end - begin].
    """
    chosen = slice(step.begin, step.end)
    z = y[..., chosen]  # [B, T, C]
    on = s != 0  # [B, T, 1]
    if step.mask >= 0:
        on = on & masks[step.mask, chosen]  # [B, T, C]
    v = vectors_of(step, vectors)  # [m, C]
    lo, hi = bounds_of(step, limits)  # [B, 1, 1]
    match KINDS[step.kind]:
        case "steer":
            new = z + s * v[0]
        case "scale":
            new = z * torch.where(s == 1, lo, 1 + s * (lo - 1))
        case "clamp":
            new = blend(z, clamp(z, lo, hi), s)
        case "clamp_component":
            c = dot(z, v, on)  # [B, T, 1]
            new = z + s * (clamp(c, lo, hi) - c) * v[0]
        case "project":
            c = dot(z, v, on)  # [B, T, m]
            c = torch.where(c < 0, 0, c) if step.one_sided else c
            new = z - s * (c @ v)
        case "fill":
            new = blend(z, v[0].expand_as(z), s)
        case "patch":
            new = blend(z, patch_target(step, patches, chosen).to(z.dtype), s)
        case "renorm":
            new = z * renorm_factor(norm(z, on), norm(entry[..., chosen], on), s)
    return torch.where(on, new, z)


def vectors_of(step: Step, vectors: Tensor) -> Tensor:
    """[m, C]: the vectors of a step on its channels; none for a step without."""
    first = max(step.vector, 0)
    return vectors[first : first + step.size, step.begin : step.end]


def bounds_of(step: Step, limits: Tensor) -> tuple[Tensor, Tensor]:
    """lo and hi of a step, each [B, 1, 1]; unbounded for a step without."""
    if step.limit < 0:
        return limits.new_full((), -torch.inf), limits.new_full((), torch.inf)
    lo, hi = limits[step.limit]  # [B]
    return lo[:, None, None], hi[:, None, None]


def blend(z: Tensor, target: Tensor, s: Tensor) -> Tensor:
    """z + s (target - z); exactly target at s = 1, whatever z is."""
    return torch.where(s == 1, target, z + s * (target - z))


def clamp(z: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """z bounded to [lo, hi]; NaN stays NaN."""
    return torch.where(z < lo, lo, torch.where(z > hi, hi, z))


def dot(z: Tensor, v: Tensor, on: Tensor) -> Tensor:
    """[B, T, m]: components of z along the rows of v [m, C], over the selected channels only."""
    return select_read(z, on) @ v.T


def norm(z: Tensor, on: Tensor) -> Tensor:
    """[B, T, 1]: root of the sum of squares over the selected channels."""
    return row_norm(select_read(z, on))


def select_read(z: Tensor, on: Tensor) -> Tensor:
    """z where the instruction reads it, else 0: values outside, NaN too, do not count."""
    return z if on.shape[-1] != z.shape[-1] else torch.where(on, z, 0)


def renorm_factor(now: Tensor, before: Tensor, s: Tensor) -> Tensor:
    """Factor that brings a row of norm `now` back to `before`; rows of norm 0 stay."""
    ratio = norm_ratio(now, before)
    return torch.where(s == 1, ratio, 1 + s * (ratio - 1))


def norm_ratio(now: Tensor, before: Tensor) -> Tensor:
    """before / now, 1 where now is 0, and finite derivatives there."""
    return torch.where(now == 0, 1, before / torch.where(now == 0, 1, now))


def patch_target(step: Step, patches: Sequence[Tensor], chosen: slice) -> Tensor:
    """[B, T, C]: for each row the entry of the source that its index names."""
    source, index = patches[2 * step.source : 2 * step.source + 2]
    return source[:, chosen][index]
