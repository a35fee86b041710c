"""The intervention program in Triton: one launch, one pass over memory.

A program instance owns a tile of BLOCK_T tokens of one row of the batch and BLOCK_D channels. It
first asks the strengths which elements of the tile the steps write and which of those depend on x,
loads only these, runs the steps on the tile in registers and stores once. Steps without a sum over
channels need no whole row, so their programs also split the channels.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops.intervention_program import KINDS, decode

_STEER = tl.constexpr(KINDS.index("steer"))
_SCALE = tl.constexpr(KINDS.index("scale"))
_CLAMP = tl.constexpr(KINDS.index("clamp"))
_CLAMP_COMPONENT = tl.constexpr(KINDS.index("clamp_component"))
_PROJECT = tl.constexpr(KINDS.index("project"))
_FILL = tl.constexpr(KINDS.index("fill"))
_PATCH = tl.constexpr(KINDS.index("patch"))
_RENORM = tl.constexpr(KINDS.index("renorm"))

_REDUCING = ("clamp_component", "project", "renorm")

# As in dreamreader/ops/intervention.py.
_CHANGED, _OVERFLOWED, _NOT_FINITE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)

# Fields of one entry of STEPS, in the order of `Step`.
_KIND = tl.constexpr(0)
_ONE_SIDED = tl.constexpr(1)
_VECTOR = tl.constexpr(2)
_COUNT = tl.constexpr(3)
_WHOLE = tl.constexpr(4)  # all channels, but for the mask
_SUMS = tl.constexpr(5)  # has a sum over channels
_MASK = tl.constexpr(6)
_LIMIT = tl.constexpr(7)
_SOURCE = tl.constexpr(8)


@triton.jit
def _chosen(masks_ptr, width, d, begin, end, MASK: tl.constexpr, WHOLE: tl.constexpr):
    """[1, BLOCK_D]: the channels that a step reads and writes."""
    chosen = d < width
    if not WHOLE:
        chosen = chosen & (d >= begin) & (d < end)
    if MASK >= 0:
        chosen = chosen & (tl.load(masks_ptr + MASK * width + d, mask=chosen, other=0) != 0)
    return chosen[None, :]


@triton.jit
def _blend(z, target, s):
    """z + s (target - z), exactly target at s = 1 whatever z is."""
    return tl.where(s == 1, target, z + s * (target - z))


@triton.jit
def _bounded(z, lo, hi):
    """z in [lo, hi]; NaN stays NaN."""
    return tl.where(z < lo, lo, tl.where(z > hi, hi, z))


@triton.jit
def _entries(source_ptr, index_ptr, size, index_strides, b, t, there, d, on):
    """[BLOCK_T, BLOCK_D]: the source entry that each row takes, NaN where there is none."""
    e = tl.load(index_ptr + b * index_strides[0] + t * index_strides[1], mask=there, other=0)
    e = e[:, None]  # [BLOCK_T, 1]
    exists = (e >= 0) & (e < size[0])
    return tl.load(
        source_ptr + e * size[1] + d[None, :] * size[2], mask=on & exists, other=float("nan")
    )


@triton.jit
def _norm(z):
    """[BLOCK_T, 1]: root of the sum of squares, correctly rounded where Triton offers it."""
    square = tl.sum(z * z, axis=1, keep_dims=True)
    if square.dtype == tl.float32:
        return tl.sqrt_rn(square)
    else:
        return tl.sqrt(square)


@triton.jit
def _ratio(before, now):
    """before / now, and 1 for rows of norm 0, which stay."""
    if now.dtype == tl.float32:
        return tl.where(now == 0, 1.0, tl.div_rn(before, now))
    else:
        return tl.where(now == 0, 1.0, before / now)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _seen(before, after, touched, HALF: tl.constexpr):
    """Bits of what was done to the touched values, as `intervene_seen` gives them."""
    bits = tl.where(before != after, _CHANGED, 0)
    if HALF:
        bits |= tl.where(after - after != 0, _OVERFLOWED, 0)
        bits |= tl.where(before - before != 0, _NOT_FINITE, 0)
    return tl.reduce(tl.reduce(tl.where(touched, bits, 0), 1, _either), 0, _either)


@triton.jit(do_not_specialize=["at"])
def _intervention_kernel(
    x_ptr,  # [B, T, D]
    out_ptr,  # [B, T, D], may be x
    strength_ptr,  # [P, B, T]
    vectors_ptr,  # [V, D]
    limits_ptr,  # [L, 2, B]
    masks_ptr,  # bool [M, D]
    sources,  # of [S, D] each
    indices,  # of int64 [B, T] each
    rows,
    tokens,
    width,
    x_strides,
    out_strides,
    strength_strides,
    source_sizes,  # (entries, entry stride, channel stride) of each source
    index_strides,  # (row, token) of each index
    ranges,  # (begin, end) of each step
    seen_ptr,  # int32
    at,
    STEPS: tl.constexpr,
    COPY: tl.constexpr,
    SEEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    work = strength_ptr.dtype.element_ty
    blocks = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)  # offsets exceed 2**31
    b = pid // blocks
    t = (pid % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    s_ptrs = strength_ptr + b * strength_strides[1] + t * strength_strides[2]  # [BLOCK_T]
    tile = x_ptr + b * x_strides[0] + t[:, None] * x_strides[1] + d[None, :] * x_strides[2]
    target_tile = (
        out_ptr + b * out_strides[0] + t[:, None] * out_strides[1] + d[None, :] * out_strides[2]
    )
    inside = (t < tokens)[:, None] & (d < width)[None, :]  # [BLOCK_T, BLOCK_D]

    touched = inside & False  # written by some step
    strengths = ()  # of [BLOCK_T, 1], one for each step
    channels = ()  # of [1, BLOCK_D]
    for i in tl.static_range(len(STEPS)):
        s = tl.load(s_ptrs + i * strength_strides[0], mask=t < tokens, other=0.0)[:, None]
        chosen = _chosen(
            masks_ptr, width, d, ranges[i][0], ranges[i][1], STEPS[i][_MASK], STEPS[i][_WHOLE]
        )
        touched = touched | ((s != 0) & chosen)
        strengths = strengths + (s,)
        channels = channels + (chosen,)
    if not COPY:
        if tl.max(tl.max(touched.to(tl.int32), axis=1), axis=0) == 0:
            return

    # Backwards: what is overwritten exactly does not depend on x, what a sum reads does.
    needed = touched
    for i in tl.static_range(len(STEPS) - 1, -1, -1):
        if STEPS[i][_KIND] == _FILL or STEPS[i][_KIND] == _PATCH:
            needed = needed & ~((strengths[i] == 1) & channels[i])
        elif STEPS[i][_SUMS]:
            needed = needed | ((strengths[i] != 0) & channels[i])
    for i in tl.static_range(len(STEPS)):
        if STEPS[i][_KIND] == _RENORM:  # reads the row as it was on entry
            needed = needed | ((strengths[i] != 0) & channels[i])

    entry = tl.load(tile, mask=needed, other=0.0).to(work)  # [BLOCK_T, BLOCK_D]
    z = entry
    for i in tl.static_range(len(STEPS)):
        s = strengths[i]
        chosen = channels[i]
        on = (s != 0) & chosen  # [BLOCK_T, BLOCK_D]
        v_ptrs = vectors_ptr + STEPS[i][_VECTOR] * width + d[None, :]
        if STEPS[i][_LIMIT] >= 0:
            lo = tl.load(limits_ptr + STEPS[i][_LIMIT] * 2 * rows + b)
            hi = tl.load(limits_ptr + (STEPS[i][_LIMIT] * 2 + 1) * rows + b)
        if STEPS[i][_KIND] == _STEER:
            # x + s v
            z = tl.where(on, z + s * tl.load(v_ptrs, mask=chosen, other=0.0), z)
        elif STEPS[i][_KIND] == _SCALE:
            # x (1 + s (f - 1))
            z = tl.where(on, z * tl.where(s == 1, lo, 1 + s * (lo - 1)), z)
        elif STEPS[i][_KIND] == _CLAMP:
            z = tl.where(on, _blend(z, _bounded(z, lo, hi), s), z)
        elif STEPS[i][_KIND] == _CLAMP_COMPONENT:
            # x + s (clamp(c, lo, hi) - c) v with c = <x, v>
            v = tl.load(v_ptrs, mask=chosen, other=0.0)  # [1, BLOCK_D]
            c = tl.sum(tl.where(chosen, z, 0.0) * v, axis=1, keep_dims=True)  # [BLOCK_T, 1]
            z = tl.where(on, z + s * (_bounded(c, lo, hi) - c) * v, z)
        elif STEPS[i][_KIND] == _PROJECT:
            # x - s V'V x
            read = tl.where(chosen, z, 0.0)  # [BLOCK_T, BLOCK_D]
            if STEPS[i][_COUNT] == 1:
                v = tl.load(v_ptrs, mask=chosen, other=0.0)  # [1, BLOCK_D]
                c = tl.sum(read * v, axis=1, keep_dims=True)  # [BLOCK_T, 1]
                if STEPS[i][_ONE_SIDED]:
                    c = tl.where(c < 0, 0.0, c)
                z = tl.where(on, z - s * (c * v), z)
            else:
                removed = tl.zeros([BLOCK_T, BLOCK_D], dtype=work)
                for _ in range(STEPS[i][_COUNT]):
                    v = tl.load(v_ptrs, mask=chosen, other=0.0)  # [1, BLOCK_D]
                    removed += tl.sum(read * v, axis=1, keep_dims=True) * v
                    v_ptrs += width
                z = tl.where(on, z - s * removed, z)
        elif STEPS[i][_KIND] == _FILL:
            z = tl.where(on, _blend(z, tl.load(v_ptrs, mask=chosen, other=0.0), s), z)
        elif STEPS[i][_KIND] == _PATCH:
            target = _entries(
                sources[STEPS[i][_SOURCE]],
                indices[STEPS[i][_SOURCE]],
                source_sizes[STEPS[i][_SOURCE]],
                index_strides[STEPS[i][_SOURCE]],
                b,
                t,
                t < tokens,
                d,
                on,
            )
            z = tl.where(on, _blend(z, target.to(work), s), z)
        elif STEPS[i][_KIND] == _RENORM:
            # x (1 + s (|x0| / |x| - 1))
            before = _norm(tl.where(chosen, entry, 0.0))  # [BLOCK_T, 1]
            ratio = _ratio(before, _norm(tl.where(chosen, z, 0.0)))
            z = tl.where(on, z * tl.where(s == 1, ratio, 1 + s * (ratio - 1)), z)

    y = z.to(out_ptr.dtype.element_ty)
    tl.store(target_tile, y, mask=touched)
    if SEEN:  # out is other memory than x
        before = tl.load(tile, mask=touched, other=0.0)
        half: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16
        bits = _seen(before.to(work), y.to(work), touched, half)
        if bits != 0:
            tl.atomic_or(seen_ptr + at, bits)
    if COPY:
        rest = inside & ~touched
        tl.store(target_tile, tl.load(tile, mask=rest, other=0.0), mask=rest)


Shapes = tuple[tuple[int, ...], ...]
Ranges = tuple[tuple[int, int], ...]


class Settings(NamedTuple):
    """Launch settings of one problem size."""

    block_t: int
    block_d: int
    warps: int


@lru_cache(maxsize=1024)
def launch_settings(
    code: str, tokens: int, width: int, *, along_tokens: bool, seen: bool = False
) -> Settings:
    """The tile of one program instance, for a packed code and the extents of x.

    `along_tokens`: tokens, not channels, are contiguous in memory. `seen`: values are compared
    with those before, which takes registers.
    """
    steps = decode(code)
    subspace = any(step.size > 1 for step in steps)
    if any(KINDS[step.kind] in _REDUCING for step in steps):
        block_d = triton.next_power_of_2(width)
        # A subspace reads its vectors once for all rows of a tile. Where tokens are contiguous, 16
        # of them fill a 32-byte sector. Both give way to registers: these tiles do not spill, those
        # of subspaces up to 8192 channels.
        if along_tokens:
            block_t = max(
                min(16, 8192 // block_d),
                min(8, (8192 if subspace or seen else 16384) // block_d),
                1,
            )
        else:
            block_t = max(min(4 if subspace else 1, 8192 // block_d), 2048 // block_d, 1)
    elif along_tokens:
        block_t, block_d = 128, 16
    else:
        block_d = next((b for b in (2048, 1024, 512, 256) if -width % b <= width // 8), 256)
        block_d = min(block_d, triton.next_power_of_2(width))
        block_t = 2048 // block_d
    block_t = min(max(block_t, 1), triton.next_power_of_2(tokens))
    elements = block_t * block_d
    return Settings(
        block_t, block_d, max(4, min(16 if along_tokens and not seen else 32, elements // 512))
    )


@lru_cache(maxsize=1024)
def constants(code: str, width: int) -> tuple[Shapes, Ranges]:
    """STEPS and ranges of a packed code; ranges are no constants, so all heads share one kernel."""
    steps = decode(code)
    shapes = tuple(
        (
            step.kind,
            step.one_sided,
            step.vector,
            step.size,
            int((step.begin, step.end) == (0, width)),
            int(KINDS[step.kind] in _REDUCING),
            step.mask,
            step.limit,
            step.source,
        )
        for step in steps
    )
    return shapes, tuple((step.begin, step.end) for step in steps)


def intervention(
    x: Tensor,
    out: Tensor,
    code: str,
    strength: Tensor,
    vectors: Tensor,
    limits: Tensor,
    masks: Tensor,
    patches: Sequence[Tensor],
    seen: Tensor | None = None,
    at: int = 0,
) -> None:
    """Applies a packed program to x [B, T, D] and writes out [B, T, D], which may be x itself.

    Args:
        x, out: any strides.
        code, strength, vectors, limits, masks, patches: see `dreamreader.ops.intervene_reference`.
        seen, at: int32, and where in it to add what `dreamreader.ops.intervention.intervene_seen`
            tells; only where `out` is other memory than x.

    Raises:
        InvalidInput: a table is not contiguous.
    """
    for name, table in (("vectors", vectors), ("limits", limits), ("masks", masks)):
        if not table.is_contiguous():
            strides = table.stride()
            raise InvalidInput(f"intervene: {name} must be contiguous, has strides {strides}")
    rows, tokens, width = x.shape
    if x.numel() == 0:
        return
    shapes, ranges = constants(code, width)
    along = x.stride(1) < x.stride(2)
    chosen = launch_settings(code, tokens, width, along_tokens=along, seen=seen is not None)
    grid = (rows * triton.cdiv(tokens, chosen.block_t), triton.cdiv(width, chosen.block_d))
    sources, indices = tuple(patches[::2]), tuple(patches[1::2])
    _intervention_kernel[grid](
        x,
        out,
        strength,
        vectors,
        limits,
        masks,
        sources,
        indices,
        rows,
        tokens,
        width,
        x.stride(),
        out.stride(),
        strength.stride(),
        tuple((len(each), *each.stride()) for each in sources),
        tuple(each.stride() for each in indices),
        ranges,
        masks if seen is None else seen,
        at,
        STEPS=shapes,
        COPY=out is not x,
        SEEN=seen is not None,
        BLOCK_T=chosen.block_t,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
    )
