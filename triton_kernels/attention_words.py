"""Attention maps of words in Triton: one launch, scores in registers.

A program instance owns BLOCK_Q queries of one head. It walks over tiles of BLOCK_K keys twice: the
first pass keeps the running maximum and sum of each query; the second computes again the scores of
the tiles that hold a weight, for WORDS words at a time. Where one tile holds all keys, its scores
serve both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
WORDS = 8  # whose sums are held at once
_NONE, _BOOL, _ADDED = 0, 1, 2  # kinds of mask


@triton.jit
def _scores(
    q_tile,  # [BLOCK_Q, 1]: pointers to channel 0
    k_tile,  # [1, BLOCK_K]
    mask_tile,  # [BLOCK_Q, BLOCK_K]
    q,
    k,
    queries,
    keys,
    width,
    q_stride,
    k_stride,
    scale,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_Q, BLOCK_K]: scale <q, k> + mask, and -inf for keys that take no part."""
    scores = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
    for begin in range(0, width, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
        a = tl.load(
            q_tile + d[None, :] * q_stride,
            mask=(q < queries)[:, None] & (d < width)[None, :],
            other=0.0,
        )  # [BLOCK_Q, BLOCK_D]
        b = tl.load(
            k_tile + d[:, None] * k_stride,
            mask=(d < width)[:, None] & (k < keys)[None, :],
            other=0.0,
        )  # [BLOCK_D, BLOCK_K]
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        scores = tl.dot(a, b, scores, input_precision="ieee")
    scores = scores * scale
    there = (q < queries)[:, None] & (k < keys)[None, :]  # [BLOCK_Q, BLOCK_K]
    allowed = (q >= 0)[:, None] & (k < keys)[None, :]
    if CAUSAL:
        allowed = allowed & (k[None, :] <= q[:, None])
    if MASK == 1:
        allowed = allowed & (tl.load(mask_tile, mask=there, other=0) != 0)
    elif MASK == 2:
        scores += tl.load(mask_tile, mask=there, other=0.0).to(tl.float32)
    return tl.where(allowed, scores, -float("inf"))


@triton.jit
def _shift(most):
    """[BLOCK_Q]: log2(e) most to a whole number, 0 where nothing was allowed."""
    return tl.where(most == -float("inf"), 0.0, tl.floor(most * _LOG2E + 0.5))


@triton.jit
def _weighed(scores, shift):
    """2^(log2(e) scores - shift); a row where nothing was allowed gives 0.

    The fraction of the exponent is taken from the score itself, so that it is rounded below 1,
    whatever the exponent. (Beyond 2^24 there is no fraction, but the sum of the whole numbers is
    rounded: hence the bounds.)
    """
    whole = shift[:, None]
    n = tl.maximum(tl.floor(scores * _LOG2E - whole + 0.5), -200.0)  # [BLOCK_Q, BLOCK_K]
    r = tl.fma(scores, tl.full(scores.shape, _LOG2E, tl.float32), -(whole + n))
    r = tl.where(r < -1, -1.0, tl.where(r > 1, 1.0, r))
    return tl.exp2(r) * tl.exp2(n)


@triton.jit
def _add(out_ptrs, sums, some, total, there):
    """out [WORDS, BLOCK_Q] += sums / total, for the words that have a weight."""
    share = tl.where(total[None, :] == 0, 0.0, sums / total[None, :])
    there = there & some[:, None]
    tl.store(out_ptrs, tl.load(out_ptrs, mask=there, other=0.0) + share, mask=there)


@triton.jit
def _attention_words_kernel(
    out_ptr,  # [B, H, W, Q]
    query_ptr,  # [B, H, Q, d]
    key_ptr,  # [B, H / groups, K, d]
    weights_ptr,  # [B, W, K]
    mask_ptr,  # [B, H, Q, K]
    heads,
    queries,
    keys,
    width,
    words,
    groups,
    scale,
    out_strides,
    query_strides,
    key_strides,
    weight_strides,
    mask_strides,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
    ONE_TILE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_Q)
    pid = tl.program_id(0).to(tl.int64)  # offsets exceed 2**31
    b = pid // tiles // heads
    h = pid // tiles % heads
    q = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    q_tile = query_ptr + b * query_strides[0] + h * query_strides[1] + q[:, None] * query_strides[2]
    k_head = key_ptr + b * key_strides[0] + h // groups * key_strides[1]
    m_rows = mask_ptr + b * mask_strides[0] + h * mask_strides[1] + q[:, None] * mask_strides[2]
    weights = weights_ptr + b * weight_strides[0]
    out_rows = out_ptr + b * out_strides[0] + h * out_strides[1] + q[None, :] * out_strides[3]

    most = tl.full([BLOCK_Q], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    e = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
    for first in range(0, keys, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
        scores = _scores(
            q_tile,
            k_head + k[None, :] * key_strides[2],
            m_rows + k[None, :] * mask_strides[3],
            q,
            k,
            queries,
            keys,
            width,
            query_strides[3],
            key_strides[3],
            scale,
            MASK,
            CAUSAL,
            WIDEN,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
        )
        now = tl.maximum(most, tl.max(scores, axis=1))  # [BLOCK_Q]
        shift = _shift(now)
        e = _weighed(scores, shift)
        before = tl.where(most == -float("inf"), most, _shift(most))
        total = total * tl.exp2(before - shift) + tl.sum(e, axis=1)
        most = now

    number = tl.arange(0, WORDS)  # [WORDS]
    for begin in range(0, words, WORDS):
        sums = tl.zeros([WORDS, BLOCK_Q], dtype=tl.float32)
        some = tl.zeros([WORDS], dtype=tl.int32)
        for first in range(0, keys, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
            w = (begin + number).to(tl.int64)  # [WORDS]
            tile = tl.load(
                weights + w[:, None] * weight_strides[1] + k[None, :] * weight_strides[2],
                mask=(w < words)[:, None] & (k < keys)[None, :],
                other=0.0,
            )  # [WORDS, BLOCK_K]
            found = tl.max((tile != 0).to(tl.int32), axis=1)  # [WORDS]
            if tl.max(found, axis=0) != 0:
                some = tl.maximum(some, found)
                if not ONE_TILE:
                    e = _weighed(
                        _scores(
                            q_tile,
                            k_head + k[None, :] * key_strides[2],
                            m_rows + k[None, :] * mask_strides[3],
                            q,
                            k,
                            queries,
                            keys,
                            width,
                            query_strides[3],
                            key_strides[3],
                            scale,
                            MASK,
                            CAUSAL,
                            WIDEN,
                            BLOCK_Q,
                            BLOCK_K,
                            BLOCK_D,
                        ),
                        _shift(most),
                    )
                # One word after the other: as a matrix product in float32 this takes more
                # registers than there are.
                for i in range(0, tl.minimum(words - begin, WORDS)):
                    row = weights + (begin + i) * weight_strides[1] + k * weight_strides[2]
                    weight = tl.load(row, mask=k < keys, other=0.0)  # [BLOCK_K]
                    part = tl.sum(e * weight[None, :], axis=1)  # [BLOCK_Q]
                    sums += tl.where(number[:, None] == i, part[None, :], 0.0)
        w = (begin + number).to(tl.int64)
        there = (w < words)[:, None] & (q < queries)[None, :]  # [WORDS, BLOCK_Q]
        _add(out_rows + w[:, None] * out_strides[2], sums, some != 0, total, there)


class Settings(NamedTuple):
    """Launch settings of one problem size."""

    block_q: int
    block_k: int
    block_d: int
    warps: int


def launch_settings(
    dtype: torch.dtype, queries: int, keys: int, width: int, *, masked: bool
) -> Settings:
    """The tile of one program instance; up to 128 keys are one tile, text tokens among them.

    float32 is multiplied without tensor cores, from registers, and a mask is read through one
    pointer for each score: both take half the queries at a time, so that no register spills.
    """
    single = dtype == torch.float32
    block_k = max(16, triton.next_power_of_2(keys)) if keys <= 128 else 64
    block_q = min(32 if single or masked else 64, max(16, triton.next_power_of_2(queries)))
    block_d = min(32 if single else 64, max(16, triton.next_power_of_2(width)))
    return Settings(block_q, block_k, block_d, 8)


def mask_kind(mask: Tensor | None) -> int:
    """MASK of the kernel."""
    return _NONE if mask is None else (_BOOL if mask.dtype == torch.bool else _ADDED)


def attention_words(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> None:
    """Adds to out [B, H, W, Q] in its memory.

    Args:
        out, query, key, weights, mask, causal, scale: see
            `dreamreader.ops.attention_words_reference_`; any strides, not float64.
    """
    batch, heads, queries, width = query.shape
    keys, words = key.shape[2], weights.shape[1]
    if batch * heads * queries * keys * words == 0:
        return
    chosen = launch_settings(query.dtype, queries, keys, width, masked=mask is not None)
    _attention_words_kernel[(batch * heads * triton.cdiv(queries, chosen.block_q),)](
        out,
        query,
        key,
        weights,
        query if mask is None else mask,  # not read without a mask
        heads,
        queries,
        keys,
        width,
        words,
        heads // key.shape[1],
        scale,
        out.stride(),
        query.stride(),
        key.stride(),
        weights.expand(batch, -1, -1).stride(),
        (0, 0, 0, 0) if mask is None else mask.stride(),
        MASK=mask_kind(mask),
        CAUSAL=causal,
        WIDEN=bool(triton.knobs.runtime.interpret),  # whose product takes bfloat16 for integers
        ONE_TILE=keys <= chosen.block_k,
        WORDS=WORDS,
        BLOCK_Q=chosen.block_q,
        BLOCK_K=chosen.block_k,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.warps,
        num_stages=1,  # loading ahead takes more registers than there are
    )
