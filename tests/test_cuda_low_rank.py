"""The CUDA kernels of the low-rank edit without a GPU, as tests/test_cuda_build.py does it."""

import shutil

import pytest
import torch
from torch import Tensor

from dreamreader.ops._low_rank_gpu import MAX_RANK, MAX_WIDTH, gradient, taken
from dreamreader.ops.low_rank import (
    NEEDS,
    _empty_gradients,
    low_rank_backward_reference,
    low_rank_reference,
)
from tests import twin
from tests.cases._compare import assert_close, same_bits
from tests.cases.low_rank import CASES, Case

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the case list leaves out: rows in runs of 16 bytes, several tiles, the widest rows, and parts
# of the sums.
LARGE = [
    Case("runs", (2, 17, 320), 8),
    Case("tiles_of_two_entries", (2, 40, 128), 20, adapters=2, index=(1, 0)),
    Case("tokens_in_runs", (1, 40, 96), 4, "nchw"),
    Case("widest", (1, 3, 8192), 2),
    Case("parts", (1, 150, 136), 9),
]
FEW = [case for case in CASES if case.rank <= MAX_RANK and 0 not in case.shape]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> twin.LowRankTwin:
    """The CUDA launchers on the CPU."""
    return twin.LowRankTwin(tmp_path_factory.mktemp("twin"))


def check(case: Case, dtype: torch.dtype, kernels: twin.LowRankTwin) -> None:
    x, *tables = case.inputs(dtype)
    before = x.clone()
    same = low_rank_reference(x, *tables)
    exact = low_rank_reference(x.double(), *doubled(tables))
    out = torch.empty_like(x).fill_(torch.nan)
    assert kernels.low_rank(x, out, *tables) == 1, case.name
    assert same_bits(x, before), case.name
    assert_close(out, same, exact)
    idle = tables[3] == 0
    assert same_bits(out[idle], before[idle]), case.name
    kernels.low_rank(x, x, *tables)  # blocks and threads run in another order now
    assert same_bits(x, out), case.name


def check_gradient(case: Case, dtype: torch.dtype, kernels: twin.LowRankTwin) -> None:
    (x, *tables), grad = case.inputs(dtype), case.gradient(dtype)
    same = low_rank_backward_reference(grad, x, *tables, needs=NEEDS)
    exact = low_rank_backward_reference(grad.double(), x.double(), *doubled(tables), needs=NEEDS)
    found, again = (poisoned(grad, tables) for _ in range(2))
    launches = kernels.backward(grad, x, *tables, *found)
    assert launches in (2, 3), case.name
    kernels.backward(grad, x, *tables, *again)
    for one, other, *expected in zip(found, again, same, exact, strict=True):
        assert same_bits(one, other), case.name
        close(case, one, *expected)


def close(case: Case, got: Tensor, same: Tensor, exact: Tensor) -> None:
    """The tolerance rule; one or two numbers may be exact in the reference by chance."""
    if case.shape[0] * case.shape[1] < 5 or got.numel() < 3:
        torch.testing.assert_close(got, same, equal_nan=True)
    else:
        assert_close(got, same, exact)


def doubled(tables: list[Tensor]) -> list[Tensor]:
    return [each.double() if each.is_floating_point() else each for each in tables]


def poisoned(grad: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """Room for the gradients, NaN everywhere."""
    results = [torch.empty_like(grad), *(torch.empty(each.shape) for each in tables[:4])]
    return [each.fill_(torch.nan) for each in results]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twin_agrees_with_the_reference(dtype: torch.dtype, kernels: twin.LowRankTwin):
    for case in FEW[::2] if dtype == torch.float32 else FEW[1::8] + LARGE:
        check(case, dtype, kernels)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twin_of_the_gradient_agrees_with_the_reference(
    dtype: torch.dtype, kernels: twin.LowRankTwin
):
    for case in FEW[1::2] if dtype == torch.float32 else FEW[::10] + LARGE[:-1]:
        check_gradient(case, dtype, kernels)


@needs_compiler
def test_twin_forms_sums_of_many_rows_in_parts(kernels: twin.LowRankTwin):
    case = LARGE[-1]
    (x, *tables), grad = case.inputs(torch.float32), case.gradient(torch.float32)
    assert kernels.backward(grad, x, *tables, *poisoned(grad, tables)) == 3
    check_gradient(case, torch.float32, kernels)


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
    assert not taken(x, tables[0])
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_agrees_with_the_reference_and_repeats(dtype: torch.dtype):
    for case in FEW + LARGE:
        (x, *tables), grad = case.inputs(dtype), case.gradient(dtype)
        g, *there = (each.cuda() for each in (grad, x, *tables))
        torch.cuda.set_sync_debug_mode("error")
        out, again = (torch.ops.dreamreader.low_rank(*there) for _ in range(2))
        found, repeated = (
            torch.ops.dreamreader.low_rank_backward(g, *there, NEEDS) for _ in range(2)
        )
        torch.cuda.set_sync_debug_mode("default")
        exact = doubled([x, *tables])
        expected = low_rank_reference(x, *tables), low_rank_reference(*exact)
        assert same_bits(out, again), case.name
        assert_close(out.cpu(), *expected)
        torch.ops.dreamreader.low_rank_(*there)
        assert same_bits(there[0], out), case.name
        same = low_rank_backward_reference(grad, x, *tables, needs=NEEDS)
        exact = low_rank_backward_reference(grad.double(), *exact, needs=NEEDS)
        for one, other, *each in zip(found, repeated, same, exact, strict=True):
            assert same_bits(one, other), case.name
            close(case, one.cpu(), *each)
