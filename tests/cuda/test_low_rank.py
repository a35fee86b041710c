"""The CUDA kernels of the low-rank edit on the CPU twin, and on a GPU without synchronising."""

import shutil
from functools import partial

import pytest
import torch

from dreamreader.ops._low_rank_gpu import MAX_RANK, MAX_WIDTH, fits_kernels, gradient
from dreamreader.ops.low_rank import (
    NEEDS,
    _empty_gradients,
    low_rank_backward_reference,
)
from tests.cases import TESTED
from tests.cases._compare import same_bits
from tests.cases.low_rank import ALL, LARGE, Case, poisoned
from tests.ops.harness import check, needs_gpu, to_device
from tests.twin import low_rank as twin

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def kernels() -> twin.LowRankTwin:
    """The CUDA launchers on the CPU."""
    return twin.LowRankTwin()


@needs_compiler
def test_twin_forms_sums_of_many_rows_in_parts(kernels: twin.LowRankTwin):
    case = LARGE[-1]
    (x, *tables), grad = case.inputs(torch.float32), case.gradient(torch.float32)
    assert kernels.backward(grad, x, *tables, *poisoned(grad, tables)) == 3
    op = TESTED["low_rank_backward"]
    check(op, case, torch.float32, partial(op.run_kernel, kernels.backward))


@needs_compiler
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (1, 2, 4)], ids=str)
def test_twin_writes_only_the_gradients_that_are_asked_for(
    wanted: tuple[int, ...], kernels: twin.LowRankTwin
):
    case = Case("some", (2, 9, 40), 5, strength="soft")
    (x, *tables), grad = case.inputs(torch.float32), case.gradient(torch.float32)
    every = poisoned(grad, tables)
    kernels.backward(grad, x, *tables, *every)
    some = poisoned(grad, tables)
    kernels.backward(grad, x, *tables, *(some[n] if n in wanted else None for n in range(5)))
    for n in range(5):
        assert same_bits(some[n], every[n]) if n in wanted else some[n].isnan().all(), n


@needs_compiler
def test_twin_does_not_visit_rows_of_strength_0(kernels: twin.LowRankTwin):
    """What lies there, NaN included, reaches no other row and no table."""
    case = Case("some", (2, 9, 40), 5, strength="soft")
    (x, *tables), grad = case.inputs(torch.float32), case.gradient(torch.float32)
    idle = tables[3] == 0
    assert idle.any() and not idle.all()
    expected = low_rank_backward_reference(grad, x, *tables, needs=NEEDS)[1:4]
    for each in (x, grad):
        each[idle] = torch.nan
    found = poisoned(grad, tables)
    kernels.backward(grad, x, *tables, *found)
    for table, wanted in zip(found[1:4], expected, strict=True):
        torch.testing.assert_close(table, wanted)
    out = x.clone()
    kernels.low_rank(out, out, *tables)
    assert out[idle].isnan().all() and out[~idle].isfinite().all()


@needs_compiler
def test_twin_turns_rows_of_a_missing_adapter_into_nan(kernels: twin.LowRankTwin):
    x, *tables, _ = Case("missing", (3, 2, 8), 2, strength="one", adapters=2).inputs(torch.float32)
    index = torch.tensor([1, 2, -1])
    dx, *tables_of = poisoned(x, tables)
    kernels.backward(x, x, *tables, index, dx, *tables_of)
    kernels.low_rank(x, x, *tables, index)
    for rows in (x, dx):
        assert rows[0].isfinite().all() and rows[1:].isnan().all()
    assert all(each.isfinite().all() for each in tables_of[:3])


@needs_compiler
def test_twin_leaves_rows_of_z_0(kernels: twin.LowRankTwin):
    x, down, bias, up, strength, index = Case("zero", (1, 6, 16), 3, strength="one").inputs(
        torch.float32
    )
    x[0, 0] = -0.0
    before = x.clone()
    kernels.low_rank(x, x, 0 * down, 0 * bias, up, strength, index)
    assert same_bits(x, before)


@needs_compiler
@pytest.mark.parametrize(
    "case", [Case("rank", (1, 2, 80), MAX_RANK + 1), Case("width", (1, 1, MAX_WIDTH + 1), 1)]
)
def test_twin_refuses_what_no_kernel_takes(case: Case, kernels: twin.LowRankTwin):
    x, *tables = case.inputs(torch.float32)
    assert not fits_kernels(x, tables[0])
    with pytest.raises(AssertionError, match="CUDA error 801"):
        kernels.low_rank(x, x, *tables)


@needs_compiler
def test_gradient_through_a_launch_gives_what_is_needed(kernels: twin.LowRankTwin):
    operator = gradient(kernels.backward, low_rank_backward_reference, _empty_gradients)
    case = Case("some", (2, 9, 40), 5)
    (x, *tables), grad = case.inputs(torch.float32), case.gradient(torch.float32)
    for needs in (
        (True, True, True, True),
        (False, True, False, False),
        (True, False, True, False),
    ):
        expected = low_rank_backward_reference(grad, x, *tables, needs=needs)
        for one, other in zip(operator(grad, x, *tables, needs), expected, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other)


@needs_gpu
@pytest.mark.gpu
def test_gpu_does_not_synchronise():
    for case in LARGE:
        x, *tables = to_device(case.inputs(torch.bfloat16))
        torch.cuda.set_sync_debug_mode("error")
        out = torch.ops.dreamreader.low_rank(x, *tables)
        torch.ops.dreamreader.low_rank_backward(out, x, *tables, ALL)
        torch.cuda.set_sync_debug_mode("default")
