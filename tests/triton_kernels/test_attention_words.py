"""The Triton kernel of the attention maps of words, compiled ahead of time."""

import re

import pytest
import torch

from tests.cases.attention_words import LONG, SMALL, TEXT, Case, Sizes
from tests.triton_kernels.harness import WIDE, compile_ahead, compiled, within_limits

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def machine_code(case: Case, dtype: str, arch: int):
    """The kernel of a case with heads seen through a view, for compute capability arch / 10."""
    from dreamreader.triton_kernels import attention_words as module

    operands = case.operands(torch.float32)
    *_, queries, keys, width, _ = case.sizes
    masked = case.mask is not None
    settings = module.launch_settings(NAMES[dtype], queries, keys, width, masked=masked)
    rows = ("i64", "i64", "i64", "constexpr")
    signature = {
        "out_ptr": "*fp32",
        "query_ptr": f"*{dtype}",
        "key_ptr": f"*{dtype}",
        "weights_ptr": "*fp32",
        "mask_ptr": "*i1" if case.mask == "bool" else f"*{dtype}",
        **dict.fromkeys(("heads", "queries", "keys", "width", "words", "groups"), "i32"),
        "scale": "fp32",
        **dict.fromkeys(("out_strides", "query_strides", "key_strides", "mask_strides"), rows),
        "weight_strides": ("i64", "i64", "constexpr"),
    }
    constants = {
        "MASK": module.mask_kind(operands.mask),
        "CAUSAL": case.causal,
        "WIDEN": False,
        "ONE_TILE": keys <= settings.block_k,
        "WORDS": module.WORDS,
        "BLOCK_Q": settings.block_q,
        "BLOCK_K": settings.block_k,
        "BLOCK_D": settings.block_d,
    }
    units = {
        (name, len(strides) - 1): 1
        for name, strides in signature.items()
        if isinstance(strides, tuple)
    }
    even = [(name,) for name in ("out_ptr", "query_ptr", "key_ptr", "width")]
    even += [(name, axis) for name in ("query_strides", "key_strides") for axis in range(3)]
    fixed = units | {(name,): value for name, value in constants.items()}
    kernel = module._attention_words_kernel
    return compile_ahead(
        kernel, signature, fixed, even, arch, num_warps=settings.warps, num_stages=1
    )


AHEAD = {
    "text": Case("text", Sizes(1, 16, 16, 4096, 77, 64, 5)),
    "causal": Case("causal", TEXT, causal=True),
    "bool": Case("bool", TEXT, mask="bool"),
    "added": Case("added", LONG, mask="added"),
    "joint": Case("joint", Sizes(1, 4, 4, 64, 1178, 64, 5)),
    "narrow": Case("narrow", SMALL),
}


@compiled
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", AHEAD)
def test_compiles_within_limits(name: str, dtype: str, arch: int):
    code = machine_code(AHEAD[name], dtype, arch)
    within_limits(code, arch)
    if dtype != "fp32" and name == "text":  # products on the tensor cores, 16 bytes at a time
        assert re.search(r"mma(\.sync|_async)", code.asm["ptx"])
        assert re.search(WIDE, code.asm["ptx"])
