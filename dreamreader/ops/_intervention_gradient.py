"""Gradient of the intervention program: the transposed steps, last one first.

For a step y -> y' with gradient g of its result on its selected channels (elsewhere g passes on):

    steer            dy = g                                 ds = <g, v>
    scale            dy = (1 + s (f - 1)) g                 ds = (f - 1) <g, y>
    clamp            dy = g, out of bounds (1 - s) g        ds = <g, clamp(y) - y>
    clamp_component  dy = g + s (h' - 1) <g, v> v           ds = (h - c) <g, v>
    project          dy = g - s V' (h' V g)                 ds = -<V g, h>
    fill, patch      dy = (1 - s) g                         ds = <g, target - y>
    renorm           dy = k g + s <g, y> dr/dy              ds = (r - 1) <g, y>

with c = V y, h what clamp_component or project make of c, r the ratio of norms, k = 1 + s (r - 1).
Strengths get the derivative of the formula also where they are 0; dy there is g bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dreamreader.ops._intervention_steps import (
    apply_step,
    bounds_of,
    clamp,
    norm_ratio,
    patch_target,
    renorm_factor,
    vectors_of,
)
from dreamreader.ops._norm import row_norm
from dreamreader.ops.intervention_program import KINDS, Step, decode


class Flow(NamedTuple):
    """Gradients that leave one step; of entry, vectors and patch target only where it has them."""

    y: Tensor  # [B, T, C]
    s: Tensor  # [B, T, 1]
    entry: Tensor | None = None  # [B, T, C]
    v: Tensor | None = None  # [m, C]
    target: Tensor | None = None  # [B, T, C]


def setup_context(ctx, inputs, output) -> None:
    """Keeps the input and the tables; `backward` computes the rows between the steps again."""
    x, code, strength, vectors, limits, masks, patches = inputs
    ctx.code = code
    ctx.save_for_backward(x, strength, vectors, limits, masks, *patches)


def twice(ctx, grad: Tensor):
    """`backward` where it is differentiated again.

    Not with a strength: its 0 and 1 are taken exactly, and so have no derivative there.
    """
    return NotImplemented if ctx.needs_input_grad[2] else backward(ctx, grad)


def backward(ctx, grad: Tensor) -> tuple:
    """Gradients of (x, code, strength, vectors, limits, masks, patches)."""
    x, strength, vectors, limits, masks, *patches = ctx.saved_tensors
    steps = decode(ctx.code)
    inputs = [x.to(strength.dtype)]  # rows before each step, [B, T, D]
    for number, step in enumerate(steps[:-1]):
        y = inputs[-1]
        s = strength[number].unsqueeze(-1)
        change = apply_step(step, y, inputs[0], s, vectors, limits, masks, patches)
        inputs.append(y.clone())
        inputs[-1][..., step.begin : step.end] = change
    g = grad.to(strength.dtype)  # [B, T, D]
    d_entry = torch.zeros_like(g)
    d_strength: list[Tensor] = [strength] * len(steps)  # each replaced below
    d_vectors = torch.zeros_like(vectors)
    d_sources = [torch.zeros_like(source, dtype=strength.dtype) for source in patches[::2]]
    for number in reversed(range(len(steps))):
        step, s = steps[number], strength[number].unsqueeze(-1)  # [B, T, 1]
        chosen = slice(step.begin, step.end)
        mask = masks[step.mask, chosen] if step.mask >= 0 else masks.new_ones(step.end - step.begin)
        on = (s != 0) & mask  # [B, T, C]
        here = torch.where(mask, g[..., chosen], 0)
        flow = transpose(step, here, inputs[number], inputs[0], s, mask, vectors, limits, patches)
        d_strength[number] = flow.s.squeeze(-1)
        if flow.entry is not None:
            d_entry[..., chosen] += torch.where(on, flow.entry, 0)
        if flow.v is not None:
            d_vectors[step.vector : step.vector + step.size, chosen] += torch.where(mask, flow.v, 0)
        if flow.target is not None:
            into = d_sources[step.source]
            rows = torch.where(on, flow.target, 0).flatten(0, 1)  # [B * T, C]
            into[:, chosen] = into[:, chosen].index_add(
                0, patches[2 * step.source + 1].flatten(), rows
            )
        g = g.clone()
        g[..., chosen] = torch.where(on, flow.y, g[..., chosen])
    d_strengths = torch.stack(d_strength) if steps else torch.zeros_like(strength)
    pairs = zip(d_sources, patches[::2], strict=True)
    d_patches = [each for d, source in pairs for each in (d.to(source.dtype), None)]
    return (g + d_entry).to(x.dtype), None, d_strengths, d_vectors, None, None, d_patches


def transpose(
    step: Step,
    g: Tensor,
    y: Tensor,
    entry: Tensor,
    s: Tensor,
    mask: Tensor,
    vectors: Tensor,
    limits: Tensor,
    patches: list[Tensor],
) -> Flow:
    """Gradients of one step; arguments as `apply_step`, with g [B, T, C] zero outside mask [C]."""
    chosen = slice(step.begin, step.end)
    y, entry = (torch.where(mask, each[..., chosen], 0) for each in (y, entry))  # [B, T, C]
    v = vectors_of(step, vectors)  # [m, C]
    lo, hi = bounds_of(step, limits)  # [B, 1, 1]
    kept = torch.where(s == 1, 0, (1 - s) * g)  # [B, T, C]: what a blend passes on
    match KINDS[step.kind]:
        case "steer":
            return Flow(g, g @ v.T, v=_over_rows(s * g, s))
        case "scale":
            return Flow(g * torch.where(s == 1, lo, 1 + s * (lo - 1)), (lo - 1) * _inner(g, y))
        case "clamp":
            inside = (y >= lo) & (y <= hi)
            return Flow(torch.where(inside, g, kept), _inner(g, clamp(y, lo, hi) - y))
        case "clamp_component":
            c, gv = y @ v.T, g @ v.T  # [B, T, 1]
            off = clamp(c, lo, hi) - c
            slope = ((c >= lo) & (c <= hi)).to(c.dtype) - 1
            return Flow(
                g + s * slope * gv * v[0], off * gv, v=_over_rows(s * (off * g + slope * gv * y), s)
            )
        case "project":
            c, gv = y @ v.T, g @ v.T  # [B, T, m]
            if step.one_sided:
                c, gv_on = torch.where(c < 0, 0, c), torch.where(c > 0, gv, 0)
            else:
                gv_on = gv
            rows = torch.where(s != 0, s, 0)
            d_v = _pairs(rows * c, g, s) + _pairs(rows * gv_on, y, s)
            return Flow(g - s * (gv_on @ v), -_inner(gv, c), v=-d_v)
        case "fill":
            return Flow(kept, _inner(g, v[0] - y), v=_over_rows(s * g, s))
        case "patch":
            return Flow(
                kept, _inner(g, patch_target(step, patches, chosen).to(y.dtype) - y), target=s * g
            )
    now, before = row_norm(y), row_norm(entry)  # renorm
    along, ratio = _inner(g, y), norm_ratio(now, before)  # [B, T, 1]
    empty, safe = now == 0, torch.where(now == 0, 1, now)
    back = torch.where(empty, 0, s * along * ratio / safe / safe)  # a square would underflow
    ahead = s * along / safe / torch.where(before == 0, 1, before)
    d_y = g * renorm_factor(now, before, s) - back * y
    d_entry = torch.where(empty | (before == 0), 0, ahead) * entry
    return Flow(d_y, along * (ratio - 1), entry=d_entry)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """[B, T, 1]: sum of a b over channels."""
    return (a * b).sum(-1, keepdim=True)


def _over_rows(a: Tensor, s: Tensor) -> Tensor:
    """[1, C]: sum of a over the rows with work, so that a NaN in a row without work stays out."""
    return torch.where(s != 0, a, 0).sum((0, 1)).unsqueeze(0)


def _pairs(c: Tensor, z: Tensor, s: Tensor) -> Tensor:
    """[m, C]: sum over the rows with work of the outer products of c [B, T, m] and z [B, T, C]."""
    c, z = (torch.where(s != 0, each, 0).flatten(0, 1) for each in (c, z))
    return c.T @ z
