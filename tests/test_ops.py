"""Every case of every operator, in every type, on every back end.

An operator is covered here by its `TESTED` in tests/cases.
"""

import shutil

import pytest
import torch

from dreamreader import _register
from dreamreader._register import native
from tests.cases import MODULES, TESTED
from tests.cases._operator import Kernel, Operator
from tests.ops.harness import by_kernel, check, check_kernel, named, needs_gpu, same

ALL = list(TESTED.values())
by_type = pytest.mark.parametrize(
    ("op", "dtype"), [(op, dtype) for op in ALL for dtype in op.dtypes], ids=named
)


def test_every_stem_is_tested():
    """In-place twins and programs by number run beside their operators."""
    beside = {"intervene_", "intervene_live_", "intervene_seen", "low_rank_"}
    assert set(_register.active) - beside <= set(TESTED)
    assert all(module.TESTED for module in MODULES.values())


@by_type
def test_active_backend(op: Operator, dtype: torch.dtype, poisoned: None):
    for case in op.cases(dtype):
        check(op, case, dtype, op.run)


@pytest.mark.parametrize("isa", ["portable", "avx2"], indirect=True)  # the best is the active one
@by_type
def test_every_instruction_set(op: Operator, dtype: torch.dtype, isa: str, poisoned: None):
    for case in op.cases(dtype):
        check(op, case, dtype, op.run)


@by_type
def test_results_do_not_depend_on_threads(op: Operator, dtype: torch.dtype):
    before, found = torch.get_num_threads(), []
    try:
        for case in op.large:
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(op.run(op.arguments(case, dtype)))
            assert all(same(found[0], other) for other in found[1:]), case.name
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@by_kernel("twin")
def test_twin_of_the_cuda_kernels(op: Operator, kernel: Kernel, dtype: torch.dtype):
    check_kernel(op, kernel, dtype)


@needs_gpu
@pytest.mark.gpu
@by_type
def test_cuda(op: Operator, dtype: torch.dtype, poisoned: None):
    for case in (op.device_cases or op.cases)(dtype):
        check(op, case, dtype, op.run, "cuda")


@needs_gpu
@pytest.mark.gpu
@by_kernel("triton")
def test_triton_on_a_gpu(op: Operator, kernel: Kernel, dtype: torch.dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    check_kernel(op, kernel, dtype, "cuda")


def test_the_native_module_has_its_kernels():
    module = native()[0]
    if module is None or _register.chosen_backend() is not None:
        pytest.skip("the native module is not used")
    owners = {name: found["CPU"].backend for name, found in _register.active.items()}
    assert [name for name, owner in owners.items() if owner != "native"] == [
        "guide_backward",
        "orthonormal",
    ]
