"""The Triton kernels of the low-rank edit and its gradient, as tests/test_triton.py does it."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamreader.ops.low_rank import NEEDS, low_rank_backward_reference, low_rank_reference
from tests.cases._compare import assert_close, same_bits, ulp
from tests.cases.low_rank import Case
from tests.test_cuda_low_rank import DTYPES, FEW, LARGE, close, doubled, poisoned
from tests.test_triton import compiled, interpret, interpreted, within_limits

triton = pytest.importorskip("triton", reason="Triton is not installed")

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@compiled
@pytest.mark.slow
def test_interpreted():
    interpret(__file__)


def near(got: Tensor, same: Tensor, exact: Tensor) -> None:
    """The tolerance rule; in float32 numpy rounds every product and every sum, unlike a GPU."""
    if got.dtype == torch.float32:
        largest = (
            exact[exact.isfinite()].abs().amax() if exact.isfinite().any() else exact.new_ones(())
        )
        atol = 32 * ulp(largest, got.dtype)
        torch.testing.assert_close(got, same, rtol=0, atol=atol, equal_nan=True)
    else:
        assert_close(got, same, exact)


@interpreted
@quiet  # numpy, which interprets, warns of the infinities that a case holds on purpose
@by_dtype
def test_interpreter_agrees_with_the_reference(dtype: torch.dtype):
    from dreamreader.triton_kernels.low_rank import low_rank

    for case in FEW[::4] if dtype == torch.float32 else FEW[1::16] + LARGE[:3]:
        x, *tables = case.inputs(dtype)
        before = x.clone()
        out = torch.empty_like(x).fill_(torch.nan)
        low_rank(x, out, *tables)
        assert same_bits(x, before), case.name
        exact = low_rank_reference(x.double(), *doubled(tables))
        near(out, low_rank_reference(x, *tables), exact)
        idle = tables[3] == 0
        assert same_bits(out[idle], before[idle]), case.name
        low_rank(x, x, *tables)
        assert same_bits(x, out), case.name


@interpreted
@quiet
@by_dtype
def test_interpreter_agrees_with_the_gradient_of_the_reference(dtype: torch.dtype):
    from dreamreader.triton_kernels.low_rank import low_rank_backward

    for case in FEW[1::5] if dtype == torch.float32 else FEW[::16] + LARGE[-1:]:
        (x, *tables), grad = case.inputs(dtype), case.gradient(dtype)
        found = poisoned(grad, tables)
        low_rank_backward(grad, x, *(*tables, *found))
        same = low_rank_backward_reference(grad, x, *tables, needs=NEEDS)
        exact = low_rank_backward_reference(
            grad.double(), x.double(), *doubled(tables), needs=NEEDS
        )
        for each in zip(found, same, exact, strict=True):
            near(*each)


@interpreted
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (1, 2, 4)], ids=str)
def test_interpreter_writes_only_the_gradients_that_are_asked_for(wanted: tuple[int, ...]):
    from dreamreader.triton_kernels.low_rank import low_rank_backward

    case = Case("some", (2, 9, 40), 5)
    (x, *tables), grad = case.inputs(torch.float32), case.gradient(torch.float32)
    kept = tables[3].clone()
    every, some = (poisoned(grad, tables) for _ in range(2))
    low_rank_backward(grad, x, *(*tables, *every))
    asked: list[Any] = [some[n] if n in wanted else None for n in range(5)]
    low_rank_backward(grad, x, *(*tables, *asked))
    for n in range(5):
        assert same_bits(some[n], every[n]) if n in wanted else some[n].isnan().all(), n
    assert same_bits(tables[3], kept) and same_bits(grad, case.gradient(torch.float32))


@interpreted
@quiet
def test_interpreter_turns_rows_of_a_missing_adapter_into_nan():
    from dreamreader.triton_kernels.low_rank import low_rank, low_rank_backward

    x, *tables, _ = Case("missing", (3, 2, 8), 2, strength="one", adapters=2).inputs(torch.float32)
    tables.append(torch.tensor([1, 2, -1]))
    dx, *tables_of = poisoned(x, tables)
    low_rank_backward(x, x, *(*tables, dx, *tables_of))
    low_rank(x, x, *tables)
    for rows in (x, dx):
        assert rows[0].isfinite().all() and rows[1:].isnan().all()
    assert all(each.isfinite().all() for each in tables_of[:3])


def ahead(
    kernel: Any,
    signature: dict[str, Any],
    constants: dict[str, Any],
    arch: int,
    **options: int,
) -> Any:
    """A kernel for compute capability arch / 10; the innermost strides of rows are 1.

    Pointers, sizes and the other strides of rows are declared multiples of 16, as Triton finds
    them where they are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = {name: number for number, name in enumerate(kernel.arg_names)}
    assert set(signature) | set(constants) == set(place)
    rows = [name for name, kind in signature.items() if isinstance(kind, tuple) and len(kind) == 3]
    even = [(place[name],) for name, kind in signature.items() if str(kind).startswith("*")]
    even += [(place[name],) for name in ("width", "hidden", "deep") if name in place]
    even += [(place[name], axis) for name in rows for axis in (0, 1)]
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(place[name], 2): 1 for name in rows}
        | {(place[name],): value for name, value in constants.items()},
        attrs={where: [["tt.divisibility", 16]] for where in even},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


ROWS = ("i64", "i64", "constexpr")
TABLES = {
    **dict.fromkeys(("down_ptr", "bias_ptr", "up_ptr", "strength_ptr"), "*fp32"),
    "index_ptr": "*i64",
}
STRIDES = {"strength_strides": ("i64", "i64"), "index_stride": "i64"}
SIZES = dict.fromkeys(("tokens", "width", "rank", "adapters"), "i32")
HALF_WIDE = r"ld\.global[.\w:]*\.v(4\.b32|2\.b64|2\.b32)"
WIDE = r"(ld\.global[.\w:]*\.v(4\.b32|2\.b64)|cp\.async)"


def kernels_ahead(dtype: str, rank: int, arch: int) -> dict[str, Any]:
    """The three kernels for rows of `dtype`."""
    from dreamreader.triton_kernels import low_rank as module

    chosen = module.launch_settings(4096, rank)
    blocks = {"R": chosen.r, "BLOCK_T": chosen.block_t, "BLOCK_D": chosen.block_d}
    edit = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | TABLES | SIZES | STRIDES
    edit |= {"x_strides": ROWS, "out_strides": ROWS}
    rows = {name: f"*{dtype}" for name in ("grad_ptr", "x_ptr", "dx_ptr")} | TABLES | SIZES
    rows |= dict.fromkeys(("d_strength_ptr", "d_ptr", "heard_ptr"), "*fp32") | STRIDES
    rows |= dict.fromkeys(("grad_strides", "x_strides", "dx_strides"), ROWS)
    names = ("coefficients_ptr", "strength_ptr", "table_ptr", "bias_ptr")
    sums = {"rows_ptr": f"*{dtype}"} | dict.fromkeys(names, "*fp32") | SIZES | STRIDES
    sums |= {"index_ptr": "*i64", "count": "i32", "rows_strides": ROWS}
    warps = {"num_warps": chosen.warps, "num_stages": 1}
    wanted = dict.fromkeys(("HIDDEN", "DX", "DS"), True)
    return {
        "edit": ahead(module._low_rank_kernel, edit, blocks | {"COPY": True}, arch, **warps),
        "rows": ahead(module._low_rank_rows_kernel, rows, blocks | wanted, arch, **warps),
        "sums": ahead(module._low_rank_sums_kernel, sums, blocks | {"BIAS": True}, arch, **warps),
    }


@compiled
@pytest.mark.parametrize(
    ("dtype", "rank", "arch"),
    [("bf16", 8, 90), ("bf16", 64, 90), ("fp32", 32, 90), ("fp32", 64, 80), ("fp16", 32, 80)],
)
def test_compiles_within_limits(dtype: str, rank: int, arch: int):
    for name, code in kernels_ahead(dtype, rank, arch).items():
        within_limits(code, arch)
        assert re.search(r"mma(\.sync|_async)", code.asm["ptx"]), name
        # Tiles for more than 16 ranks leave a thread four channels.
        assert re.search(WIDE if rank <= 16 else HALF_WIDE, code.asm["ptx"]), name
        assert not re.search(r"ld\.global[.\w:]*\.b(8|16)\b", code.asm["ptx"]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@compiled
@by_dtype
def test_gpu_agrees_with_the_reference_and_repeats(dtype: torch.dtype):
    from dreamreader.triton_kernels.low_rank import low_rank, low_rank_backward

    for case in FEW + LARGE:
        (x, *tables), grad = case.inputs(dtype), case.gradient(dtype)
        if not x.isfinite().all():  # a product in parts makes NaN of an infinity
            continue
        g, there, *tables_there = (each.cuda() for each in (grad, x, *tables))
        out, again = (torch.empty_like(there).fill_(torch.nan) for _ in range(2))
        for each in (out, again):
            low_rank(there, each, *tables_there)
        assert same_bits(out, again), case.name
        exact = low_rank_reference(x.double(), *doubled(tables))
        assert_close(out.cpu(), low_rank_reference(x, *tables), exact)
        found, again = ([each.cuda() for each in poisoned(grad, tables)] for _ in range(2))
        for each in (found, again):
            low_rank_backward(g, there, *(*tables_there, *each))
        same = low_rank_backward_reference(grad, x, *tables, needs=NEEDS)
        exact = low_rank_backward_reference(
            grad.double(), x.double(), *doubled(tables), needs=NEEDS
        )
        for one, other, *expected in zip(found, again, same, exact, strict=True):
            assert same_bits(one, other), case.name
            close(case, one.cpu(), *expected)
