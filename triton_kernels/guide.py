"""Probe guidance in Triton: one launch, whatever the number of steps.

A program instance owns BLOCK_T tokens of one entry of the batch. It reads their channels twice: for
a_0 = W1 h_0 + b1, and for h_0 - W1' e. Between them all steps run on the hidden units, with
q = G e and G = W1 W1':

    a = a_0 - q        e += s gamma^t v(a)        |change|^2 = <e, q>

A product takes its left side from memory in blocks, so what one step leaves for the next goes
through a scratch row of [e | hidden | back], which the program instance has for itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreamreader import _alloc

MAX_HIDDEN = 256
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _product(
    left,  # [BLOCK_T, 1]: pointers to the first column
    left_stride,
    on,  # [BLOCK_T]
    table,  # pointer to (0, first column)
    inner,
    columns,
    inner_stride,
    column_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_T, BLOCK_N]: left times table [inner, columns]; and the squared norms of the left."""
    n = tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
    total = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    square = tl.zeros([BLOCK_T], dtype=tl.float32)
    for begin in range(0, inner, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
        a = tl.load(
            left + k[None, :] * left_stride, mask=on[:, None] & (k < inner)[None, :], other=0.0
        ).to(tl.float32)  # [BLOCK_T, BLOCK_K]
        b = tl.load(
            table + k[:, None] * inner_stride + n[None, :] * column_stride,
            mask=(k < inner)[:, None] & (n < columns)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        total = tl.dot(a, b, total, input_precision=_PRECISION)
        square += tl.sum(a * a, axis=1)
    return total, square


@triton.jit
def _keep(ptrs, value):
    """Leaves a tile for all threads of the program instance, after they have read the last one."""
    tl.debug_barrier()
    tl.store(ptrs, value)
    tl.debug_barrier()


@triton.jit
def _value(a, ACTIVATION: tl.constexpr):
    """The activation; relu keeps NaN."""
    if ACTIVATION == "relu":
        return tl.where(a < 0, 0.0, a)
    elif ACTIVATION == "gelu":
        return a * (0.5 * (1 + tl.erf(a * 0.7071067811865476)))
    else:
        return a * tl.sigmoid(a)


@triton.jit
def _slope(a, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == "relu":
        return (a > 0).to(tl.float32)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(a * 0.7071067811865476))
        return share + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
    else:
        share = tl.sigmoid(a)
        return share * (1 + a * (1 - share))


@triton.jit
def _guide_kernel(
    x_ptr,  # [B, T, D]
    out_ptr,  # [B, T, D]
    first_ptr,  # W1: [H1, D]
    first_bias_ptr,  # b1: [B, 1, H1]
    second_ptr,  # W2: [H2, H1], three layers only
    second_bias_ptr,  # b2: [H2]
    gram_ptr,  # G: [H1, H1]
    top_ptr,  # c times the last weight: [B, H of the layer before] (one layer: c itself)
    strength_ptr,  # [B, T]
    scratch_ptr,  # [programs, BLOCK_T, 2 P1 + P2]
    tokens,
    width,
    hidden,  # H1
    deep,  # H2
    iterations,
    gamma,
    trust,
    x_strides,
    out_strides,
    bias_stride,
    strength_strides,
    LAYERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BOUNDED: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)  # offsets exceed 2**31
    b = pid // blocks
    t = pid % blocks * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    s_ptrs = strength_ptr + b * strength_strides[0] + t * strength_strides[1]
    s = tl.load(s_ptrs, mask=t < tokens, other=0.0)  # [BLOCK_T]
    on = s != 0
    every = t >= 0  # [BLOCK_T]: scratch rows are all there
    tile = x_ptr + b * x_strides[0] + t[:, None] * x_strides[1]  # [BLOCK_T, 1]
    n = tl.arange(0, P1)  # [P1]
    m = tl.arange(0, P2)  # [P2]
    scratch = scratch_ptr + (pid * BLOCK_T + tl.arange(0, BLOCK_T))[:, None] * (2 * P1 + P2)

    # a_0 = W1 h_0 + b1
    start, square = _product(
        tile, x_strides[2], on, first_ptr, width, hidden, 1, width, BLOCK_T, BLOCK_K, P1
    )  # [BLOCK_T, P1], [BLOCK_T]
    start += tl.load(first_bias_ptr + b * bias_stride + n, mask=n < hidden, other=0.0)[None, :]
    if LAYERS == 3:
        top = tl.load(top_ptr + b * deep + m, mask=m < deep, other=0.0)[None, :]  # [1, P2]
        second_bias = tl.load(second_bias_ptr + m, mask=m < deep, other=0.0)[None, :]
    else:
        top = tl.load(top_ptr + b * hidden + n, mask=n < hidden, other=0.0)[None, :]  # [1, P1]

    e = tl.zeros([BLOCK_T, P1], dtype=tl.float32)
    q = tl.zeros([BLOCK_T, P1], dtype=tl.float32)  # G e
    f = s
    for i in range(0, iterations):
        # v: gradient of the weighted logits with respect to a_t
        if LAYERS == 1:
            v = tl.broadcast_to(top, [BLOCK_T, P1])
        elif LAYERS == 2:
            v = top * _slope(start - q, ACTIVATION)
        else:
            _keep(scratch + P1 + n[None, :], _value(start - q, ACTIVATION))
            a, _ = _product(
                scratch + P1, 1, every, second_ptr, hidden, deep, 1, hidden, BLOCK_T, BLOCK_K, P2
            )  # [BLOCK_T, P2]
            _keep(scratch + 2 * P1 + m[None, :], top * _slope(a + second_bias, ACTIVATION))
            v, _ = _product(
                scratch + 2 * P1,
                1,
                every,
                second_ptr,
                deep,
                hidden,
                hidden,
                1,
                BLOCK_T,
                BLOCK_K,
                P1,
            )  # [BLOCK_T, P1]
            v = v * _slope(start - q, ACTIVATION)
        e += f[:, None] * tl.where((n < hidden)[None, :], v, 0.0)
        f = f * gamma
        again = BOUNDED or ((LAYERS > 1) and (i + 1 < iterations))
        if again:
            _keep(scratch + n[None, :], e)
            q, _ = _product(
                scratch, 1, every, gram_ptr, hidden, hidden, hidden, 1, BLOCK_T, BLOCK_K, P1
            )
        if BOUNDED:
            norm = tl.sqrt_rn(tl.maximum(tl.sum(e * q, axis=1), 0.0))  # [BLOCK_T]
            limit = trust * tl.sqrt_rn(square)
            beyond = norm > limit
            within = tl.where(beyond, tl.div_rn(limit, tl.where(beyond, norm, 1.0)), 1.0)[:, None]
            e = e * within
            q = q * within

    # h_0 - W1' e
    _keep(scratch + n[None, :], e)
    out_tile = out_ptr + b * out_strides[0] + t[:, None] * out_strides[1]
    for begin in range(0, width, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
        change, _ = _product(
            scratch,
            1,
            every,
            first_ptr + begin,
            hidden,
            width - begin,
            width,
            1,
            BLOCK_T,
            BLOCK_K,
            BLOCK_D,
        )  # [BLOCK_T, BLOCK_D]
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        x = tl.load(tile + d[None, :] * x_strides[2], mask=inside, other=0.0)
        y = (x.to(tl.float32) - change).to(x.dtype)
        tl.store(out_tile + d[None, :] * out_strides[2], tl.where(on[:, None], y, x), mask=inside)


class Settings(NamedTuple):
    """Launch settings of one problem size."""

    p1: int
    p2: int
    block_t: int
    block_k: int
    block_d: int
    warps: int
    stages: int


def launch_settings(tokens: int, hidden: int, deep: int, *, layers: int) -> Settings:
    """The tile of one program instance; hidden units are padded to powers of two.

    Three layers hold more at once, and load less ahead so that no register spills.
    """
    p1, p2 = (max(16, triton.next_power_of_2(each)) for each in (hidden, deep))
    most = min(32 if layers == 3 else 64, max(16, 4096 // max(p1, p2)))
    block_t = min(most, max(16, triton.next_power_of_2(tokens)))
    block_k, stages = (16, 2) if layers == 3 else (32, 3)
    return Settings(p1, p2, block_t, block_k, 64, 8, stages)


def supported(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel takes this call."""
    widths = [len(each) for each in weights[: max(1, len(weights) - 1)]]
    return x.dtype != torch.float64 and max(widths) <= MAX_HIDDEN and x.shape[2] > 0


def guide(
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    coefficients: Tensor,
    strength: Tensor,
    gamma: float,
    iterations: int,
    trust: float,
) -> None:
    """Writes the guided rows to out [B, T, D].

    Args:
        x, out, strength: any strides. weights: dense. The others: see
            `dreamreader.ops.guide_reference`.
    """
    batch, tokens, width = x.shape
    if x.numel() == 0:
        return
    layers, first = len(weights), weights[0]
    hidden, deep = len(first), len(weights[1]) if layers == 3 else 1
    # In float64, since neither may depend on whether tf32 is allowed.
    gram = (first.double() @ first.double().T).float()  # [H1, H1]
    top = coefficients if layers == 1 else coefficients.double() @ weights[-1].double()
    chosen = launch_settings(tokens, hidden, deep, layers=layers)
    programs = batch * triton.cdiv(tokens, chosen.block_t)
    pitch = 2 * chosen.p1 + chosen.p2
    scratch = _alloc.empty((programs, chosen.block_t, pitch), dtype=torch.float32, device=x.device)
    _guide_kernel[(programs,)](
        x,
        out,
        first,
        biases[0],
        weights[1] if layers == 3 else first,  # not read with fewer layers
        biases[1] if layers == 3 else biases[0],
        gram,
        top.float().contiguous(),
        strength,
        scratch,
        tokens,
        width,
        hidden,
        deep,
        iterations,
        gamma,
        trust,
        x.stride(),
        out.stride(),
        biases[0].stride(0),
        strength.stride(),
        LAYERS=layers,
        ACTIVATION=activation,
        BOUNDED=trust < float("inf"),
        P1=chosen.p1,
        P2=chosen.p2,
        BLOCK_T=chosen.block_t,
        BLOCK_K=chosen.block_k,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
