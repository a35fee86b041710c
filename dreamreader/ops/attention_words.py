"""Attention maps of words, straight from q and k: no attention tensor is kept.

For every batch entry b, head h and query q, with j the keys that may take part:

    s_j = scale <query[b, h, q], key[b, h / groups, j]> + mask[b, h, q, j]
    p = softmax_j(s)
    out[b, h, w, q] += sum_j weights[b, w, j] p_j

A word is a row of weights over the keys: the mean of its tokens has 1 / count at each of them. A
key that a bool mask or `causal` leaves out takes no part, whatever it holds; a query without any
key adds 0, and so does a word without any weight. Arithmetic in float32 (float64 for float64).
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput
from dreamreader.ops._types import FLOATS, NEEDED


def attention_words_(
    out: Float[Tensor, "batch heads words queries"],
    query: Float[Tensor, "batch heads queries d"],
    key: Float[Tensor, "batch key_heads keys d"],
    weights: Float[Tensor, "#batch words keys"],
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch heads words queries"]:
    """Adds the attention of every query to the given words to `out`, in its memory.

    Formula: see the module; out += weights softmax(scale query key' + mask)'.

    Args:
        out: sums so far [batch, heads, words, queries], float32 (or float64 for float64 queries),
            of any strides that do not overlap.
        query: [batch, heads, queries, d], floating point, any strides: heads seen through a view
            of [batch, queries, heads * d] are not copied.
        key: [batch, key_heads, keys, d] like query; heads is a multiple of key_heads, and groups
            of heads / key_heads heads that follow each other share one.
        weights: [batch or 1, words, keys] in the dtype of `out`, finite; keys of weight 0 cost
            nothing but their part in the softmax.
        mask: broadcast to [batch, heads, queries, keys] without a copy; bool (True takes part), or
            added to the scaled scores, in float32 or the dtype of `query`.
        causal: key j takes part for the queries j and later, counted from the first of both.
        scale: factor of the scores, 1 / sqrt(d) by default.

    Returns:
        `out` itself, its version counter raised by one.

    Raises:
        InvalidInput: a shape, dtype or device does not fit, or `out` requires grad.

    Example:
        >>> import torch
        >>> query, key = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 5, 4)
        >>> out = torch.zeros(1, 1, 1, 2)
        >>> attention_words_(out, query, key, torch.tensor([[[0.0, 0.5, 0.5, 0.0, 0.0]]]))
        tensor([[[[0.2000, 0.2000]]]])

    Limits: a measurement without a gradient: nothing flows back to query, key or weights. Kernels
    cover float16, bfloat16 and float32; float64 runs in plain torch.
    """
    _check(out, query, key, weights)
    if mask is not None:
        mask = _expand_mask(mask, query, key)
    factor = max(query.shape[3], 1) ** -0.5 if scale is None else float(scale)
    if torch.is_grad_enabled():
        query, key, weights = map(_constant, (query, key, weights))
        mask = mask if mask is None else _constant(mask)
    _attention_words_(out, query, key, weights, mask, causal, factor)
    return out


@torch.no_grad()
def attention_words_reference_(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> None:
    """The definition of `attention_words_` in plain torch, on any device.

    Args:
        out: [B, H, W, Q]. query: [B, H, Q, d]. key: [B, G, K, d]. weights: [B or 1, W, K].
        mask: [B, H, Q, K] or None. causal, scale: see `attention_words_`.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = query.shape[1] // max(key.shape[1], 1)
    keys = key.to(work).repeat_interleave(groups, dim=1)  # [B, H, K, d]
    scores = (query.to(work) @ keys.transpose(2, 3)) * scale  # [B, H, Q, K]
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    left_out = None if mask is None or mask.dtype != torch.bool else ~mask
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        left_out = later if left_out is None else left_out | later
    if left_out is not None:
        scores = scores.masked_fill(left_out, -torch.inf)
    p = scores.softmax(-1)
    if scores.shape[3]:
        p = p.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0)
    added = weights.to(work).unsqueeze(1) @ p.transpose(2, 3)  # [B, H, W, Q]
    words = (weights != 0).any(-1)[:, None, :, None]  # [B or 1, 1, W, 1]
    out.add_(torch.where(words, added, 0))


def _cpu(out: Tensor, query: Tensor, key: Tensor, weights, mask, causal, scale) -> None:
    if query.dtype == torch.float64:
        return attention_words_reference_(out, query, key, weights, mask, causal, scale)
    _native.attention_words_cpu(out, query, key, weights, mask, causal, scale, _threads())
    _increment_version(out)


def _cuda(out: Tensor, query: Tensor, key: Tensor, weights, mask, causal, scale) -> None:
    if query.dtype == torch.float64:
        return attention_words_reference_(out, query, key, weights, mask, causal, scale)
    _native.attention_words_cuda(out, query, key, weights, mask, causal, scale)
    _increment_version(out)


def _triton(out: Tensor, query: Tensor, key: Tensor, weights, mask, causal, scale) -> None:
    if query.dtype == torch.float64:
        return attention_words_reference_(out, query, key, weights, mask, causal, scale)
    kernel = import_module(_TRITON).attention_words
    kernel(out, query, key, weights, mask, causal, scale)
    _increment_version(out)


def _fake(out: Tensor, query: Tensor, key: Tensor, weights, mask, causal, scale) -> None:
    return None


def _check(out: Tensor, query: Tensor, key: Tensor, weights: Tensor) -> None:
    """Raises InvalidInput unless the four tensors belong together."""
    if query.dim() != 4 or key.dim() != 4 or weights.dim() != 3 or out.dim() != 4:
        raise _misfit(
            "expected query [batch, heads, queries, d], key [batch, key_heads, keys, d], "
            "weights [batch, words, keys] and out [batch, heads, words, queries], got "
            f"{list(query.shape)}, {list(key.shape)}, {list(weights.shape)} and {list(out.shape)}"
        )
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != width:
        raise _misfit(f"key must be [{batch}, key_heads, keys, {width}] as query is, ", key)
    if heads % key_heads if key_heads else heads:
        raise _misfit(f"{heads} heads of query are no multiple of {key_heads} heads of key")
    if weights.shape[0] not in (1, batch) or weights.shape[2] != keys:
        raise _misfit(f"weights must be [{batch} or 1, words, {keys}], ", weights)
    if out.shape != (batch, heads, weights.shape[1], queries):
        raise _misfit(f"out must be {[batch, heads, weights.shape[1], queries]}, ", out)
    if query.dtype not in FLOATS or query.dtype != key.dtype:
        raise _misfit(
            f"query and key must share a floating point type, got {query.dtype} and {key.dtype}; "
            f"{NEEDED} are possible"
        )
    if not (
        out.dtype == weights.dtype == torch.float32
        or out.dtype == weights.dtype == query.dtype == torch.float64
    ):
        raise _misfit(
            "out and weights must be float32 (or float64 with query), got "
            f"{out.dtype} and {weights.dtype} for {query.dtype} queries"
        )
    if not query.device == key.device == weights.device == out.device:
        raise _misfit(
            f"query is on {query.device}, key on {key.device}, weights on {weights.device}, "
            f"out on {out.device}"
        )
    if out.requires_grad:
        raise _misfit("out requires grad, and what is added to it has no gradient")


def _expand_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as [batch, heads, queries, keys], without a copy."""
    full = (*query.shape[:3], key.shape[2])
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise _misfit(f"mask must be torch.bool, float32 or query's dtype, got {mask.dtype}")
    if mask.device != query.device:
        raise _misfit(f"mask is on {mask.device}, query on {query.device}")
    try:
        return mask.expand(full)
    except RuntimeError:
        raise _misfit(f"mask must broadcast to {list(full)}, ", mask) from None


def _constant(value: Tensor) -> Tensor:
    return value.detach() if value.requires_grad else value


def _misfit(text: str, got: Tensor | None = None) -> InvalidInput:
    return InvalidInput(
        f"attention_words_: {text}" + ("" if got is None else f"got {list(got.shape)}")
    )


_native: Any = native()[0]
_threads = torch.get_num_threads
_increment_version = torch.autograd.graph.increment_version
_TRITON = "dreamreader.triton_kernels.attention_words"

_attention_words_ = register(
    "attention_words_",
    "(Tensor(a!) out, Tensor query, Tensor key, Tensor weights, Tensor? mask, bool causal, "
    "float scale) -> ()",
    reference=attention_words_reference_,
    fake=_fake,
    cpu=Kernel("attention_words_cpu", _cpu),
    cuda=Kernel("attention_words_cuda", _cuda),
    triton=Kernel(_TRITON, _triton),
)

__all__ = ["attention_words_", "attention_words_reference_"]
