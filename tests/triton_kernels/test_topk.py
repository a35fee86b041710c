"""The Triton kernels of the largest entries of rows: many blocks, and compiled ahead of time."""

import re
import sys

import pytest
import torch

from dreamreader.ops import topk, topk_reference
from tests.cases._matrices import identical, matrix
from tests.triton_kernels.harness import WIDE, compiled, interpreted
from tests.triton_kernels.selection import by_type, compile_selection, registered, small_blocks


@interpreted
@pytest.mark.parametrize("values", ["half_ties", "ascending", "nan", "sparse"])
def test_interpreter_gives_the_same_for_lists_that_blocks_change(
    monkeypatch: pytest.MonkeyPatch, values: str
):
    small_blocks(monkeypatch)
    module = sys.modules["dreamreader.ops.topk"]
    for k in (1, 20):
        x = matrix(values, (2, 150), torch.bfloat16)
        identical(None, list(module._triton(x, k)), list(topk_reference(x, k)), [])


@interpreted
def test_gradients_of_the_interpreter():
    module = sys.modules["dreamreader.ops.topk"]
    call = registered(module, "(Tensor x, int k) -> (Tensor, Tensor, Tensor)")
    x = matrix("half_ties", (3, 40), torch.float32).requires_grad_()
    factor = torch.arange(12.0)
    (found,) = torch.autograd.grad((call(x, 4)[0] * factor).sum(), x)
    (wanted,) = torch.autograd.grad((topk(x, 4).values * factor).sum(), x)
    assert torch.equal(found, wanted)


@compiled
@by_type
@pytest.mark.parametrize("size", [64, 1024])
def test_compiles_within_limits(dtype: str, arch: int, size: int):
    from dreamreader.triton_kernels import topk as module
    from dreamreader.triton_kernels._selection import BLOCK, warps_of

    for new in (True, False):
        ptx = compile_selection(
            module._merge_kernel, dtype, arch, warps_of(BLOCK), {}, NEW=new, LIST=size, BLOCK=BLOCK
        )
        assert re.search(WIDE, ptx)
    compile_selection(module._emit_kernel, dtype, arch, 4, {"end_ptr": "*i64"}, LIST=size)
