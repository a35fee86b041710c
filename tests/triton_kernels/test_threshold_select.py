"""The Triton kernels of what is above a threshold: many blocks, and compiled ahead of time."""

import re
import sys

import pytest
import torch

from dreamreader.ops import threshold_select, threshold_select_reference
from tests.cases._matrices import identical, matrix
from tests.triton_kernels.harness import WIDE, compiled, interpreted
from tests.triton_kernels.selection import by_type, compile_selection, registered, small_blocks


@interpreted
@pytest.mark.parametrize("values", ["half_ties", "nan", "tiny"])
@pytest.mark.parametrize("slots", [300, 10])
def test_interpreter_gives_the_same_for_many_blocks(
    monkeypatch: pytest.MonkeyPatch, values: str, slots: int
):
    small_blocks(monkeypatch)
    x, threshold = matrix(values, (2, 150), torch.bfloat16), torch.randn(150)
    found = sys.modules["dreamreader.ops.threshold_select"]._triton(x, threshold, slots)
    identical(None, list(found), list(threshold_select_reference(x, threshold, slots)), [])


@interpreted
def test_gradients_of_the_interpreter():
    schema = "(Tensor x, Tensor threshold, int slots) -> (Tensor, Tensor, Tensor)"
    call = registered(sys.modules["dreamreader.ops.threshold_select"], schema)
    x, threshold = matrix("normal", (3, 40), torch.float32).requires_grad_(), torch.tensor(0.5)
    factor = torch.arange(120.0)
    (found,) = torch.autograd.grad((call(x, threshold, 120)[0] * factor).sum(), x)
    values = threshold_select(x, threshold, 120).values
    (wanted,) = torch.autograd.grad((values * factor).sum(), x)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_limits_say_what_a_comparison_says(dtype: torch.dtype):
    """All values of 16 bits that are not negative, and some of 32, beside thresholds between."""
    pytest.importorskip("triton")
    from dreamreader.triton_kernels._selection import FORMS
    from dreamreader.triton_kernels.threshold_select import limits

    form = FORMS[dtype]
    step = 1 if form.bits == 15 else 65_521
    bits = torch.arange(0, form.infinity + 1, step).to(form.word)
    values = bits.view(dtype)
    order = (1 << form.bits) - 1 - bits.int()
    some = values[:: len(values) // 90].float()
    thresholds = torch.cat([some, some * 1.0003, torch.tensor([-1.0, 1e-30, 7e4, torch.inf])])
    for threshold in thresholds:
        above = (values.float() > threshold) & (values > 0)
        assert torch.equal(order < limits(threshold, dtype), above), float(threshold)
    nothing = limits(torch.tensor(torch.nan), dtype)
    assert not (order < nothing).any() and int(nothing) > (1 << form.bits) - 1 - form.nan


@compiled
@by_type
def test_compiles_within_limits(dtype: str, arch: int):
    from dreamreader.triton_kernels import _candidates as module
    from dreamreader.triton_kernels._selection import BLOCK, warps_of

    one = {"POOL": False, "BLOCK": BLOCK}
    ptx = compile_selection(
        module.append_kernel, dtype, arch, warps_of(BLOCK), {}, EACH=True, **one
    )
    assert re.search(WIDE, ptx)
    every = one | {"ALL": True, "AGAIN": False, "LIST": module.LIST}
    for kernel in (module.tally_kernel, module.write_kernel):
        compile_selection(kernel, dtype, arch, 4, {}, **every)
