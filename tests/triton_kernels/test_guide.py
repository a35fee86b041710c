"""The Triton kernel of probe guidance: where it applies, and compiled ahead of time."""

import re
from typing import Any

import pytest
import torch

from tests.cases._compare import same_bits
from tests.cases.guide import Case
from tests.triton_kernels.harness import ROWS, WIDE, ahead, compiled, interpreted, within_limits


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_interpreter_keeps_values_that_are_not_finite_in_their_row():
    from dreamreader.triton_kernels.guide import guide

    x, *arguments = Case("odd", (2, 9, 40), (16, 16), selection="all", trust=0.5).inputs(
        torch.float32
    )
    expected = torch.empty_like(x)
    guide(x, expected, *arguments)
    x[0, 3, 1], x[1, 8, 0] = torch.nan, torch.inf
    out = torch.empty_like(x)
    guide(x, out, *arguments)
    others = x.isfinite().all(-1)
    assert same_bits(out[others], expected[others])
    assert not out[0, 3].isfinite().all() and not out[1, 8].isfinite().all()


def test_only_what_fits_is_taken():
    from dreamreader.triton_kernels.guide import MAX_HIDDEN, supported

    x, *layers = torch.ones(1, 2, 8), torch.ones(MAX_HIDDEN, 8), torch.ones(3, MAX_HIDDEN)
    assert supported(x, layers)
    assert not supported(x.double(), layers)
    wide = [torch.ones(MAX_HIDDEN + 1, 8), torch.ones(3, MAX_HIDDEN + 1)]
    assert not supported(x, wide)
    assert not supported(x, [torch.ones(4, 8), torch.ones(MAX_HIDDEN + 1, 4), torch.ones(2, 257)])


def machine_code(dtype: str, hidden: tuple[int, ...], activation: str, arch: int) -> Any:
    """The kernel of a probe with a trust region, layers `hidden` and one for the logits."""
    from dreamreader.triton_kernels import guide as module

    layers = len(hidden) + 1
    first, deep = hidden[0] if hidden else 8, hidden[1] if layers == 3 else 1
    chosen = module.launch_settings(4096, first, deep, layers=layers)
    floats = ("first", "first_bias", "second", "second_bias", "gram", "top", "strength", "scratch")
    signature = {
        "x_ptr": f"*{dtype}",
        "out_ptr": f"*{dtype}",
        **{f"{name}_ptr": "*fp32" for name in floats},
        **dict.fromkeys(("tokens", "width", "hidden", "deep", "iterations"), "i32"),
        **dict.fromkeys(("gamma", "trust"), "fp32"),
        "x_strides": ROWS,
        "out_strides": ROWS,
        "bias_stride": "i64",
        "strength_strides": ("i64", "i64"),
    }
    constants = {
        "LAYERS": layers,
        "ACTIVATION": activation,
        "BOUNDED": True,
        "P1": chosen.p1,
        "P2": chosen.p2,
        "BLOCK_T": chosen.block_t,
        "BLOCK_K": chosen.block_k,
        "BLOCK_D": chosen.block_d,
    }
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    return ahead(module._guide_kernel, signature, constants, arch, **options)


@compiled
@pytest.mark.parametrize(
    ("dtype", "hidden", "activation", "arch"),
    [
        ("bf16", (), "relu", 90),
        ("bf16", (128,), "gelu", 90),
        ("fp32", (256,), "silu", 80),
        ("bf16", (128, 128), "relu", 90),
        ("fp16", (64, 64), "silu", 80),
        ("fp32", (256, 256), "gelu", 90),
    ],
    ids=str,
)
def test_compiles_within_limits(dtype: str, hidden: tuple[int, ...], activation: str, arch: int):
    code = machine_code(dtype, hidden, activation, arch)
    within_limits(code, arch)
    text = code.asm["ptx"]
    assert re.search(r"mma(\.sync|_async)", text) and re.search(WIDE, text)
    assert not re.search(r"ld\.global[.\w:]*\.b(8|16)\b", text)
