"""The launcher of the attention maps of words."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from tests.twin import DTYPES, compiled

MASKS = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}


class Call(ctypes.Structure):
    """As `Call` in attention_words.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "weights", "mask", "out")),
        ("dtype", ctypes.c_int64),
        ("mask_type", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 7),
        ("query_strides", ctypes.c_int64 * 4),
        ("key_strides", ctypes.c_int64 * 4),
        ("weight_strides", ctypes.c_int64 * 3),
        ("out_strides", ctypes.c_int64 * 4),
        ("mask_strides", ctypes.c_int64 * 4),
        ("causal", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


def build() -> Callable[..., int]:
    """The launcher of the attention maps of words; it gives the number of launches."""
    launch = compiled("attention_words")

    def attention_words(
        out: Tensor, query: Tensor, key: Tensor, weights: Tensor, mask, causal: bool, scale: float
    ) -> int:
        batch, heads, queries, width = query.shape
        groups = max(heads // max(key.shape[1], 1), 1)
        call = Call(
            query=query.data_ptr(),
            key=key.data_ptr(),
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            dtype=DTYPES[query.dtype],
            sizes=(batch, heads, queries, key.shape[2], width, weights.shape[1], groups),
            query_strides=query.stride(),
            key_strides=key.stride(),
            weight_strides=weights.expand(batch, -1, -1).stride(),
            out_strides=out.stride(),
            causal=causal,
            scale=scale,
        )
        if mask is not None:
            call.mask, call.mask_type = mask.data_ptr(), MASKS[mask.dtype]
            call.mask_strides[:] = mask.stride()
        return launch(call)

    return attention_words
