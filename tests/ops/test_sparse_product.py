"""Properties of the products of sparse rows, and what is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import (
    SparseRows,
    sparse_column_sums,
    sparse_decode,
    sparse_dots,
    sparse_outer,
)

NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


def make(rows: int, width: int, share: float = 0.2, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(3)
    dense = torch.randn(rows, width, generator=g, dtype=dtype)
    dense = torch.where(torch.rand(rows, width, generator=g) < share, dense, 0)
    return dense, SparseRows.from_dense(dense)


def test_products_are_those_of_dense_matrices(isa: str):
    dense, codes = make(23, 41)
    g = torch.Generator().manual_seed(4)
    x, weight, bias = (torch.randn(*n, generator=g).double() for n in ((23, 70), (41, 70), (70,)))
    torch.testing.assert_close(sparse_decode(codes, weight, bias), dense @ weight + bias)
    torch.testing.assert_close(sparse_outer(codes, x), dense.T @ x)
    torch.testing.assert_close(sparse_column_sums(codes), dense.sum(0))
    torch.testing.assert_close(sparse_dots(codes, x, weight), (x @ weight.T)[dense != 0])


def test_gradients_are_those_of_dense_matrices():
    dense, codes = make(9, 17)
    g = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(17, 12, generator=g).double(), torch.randn(12, generator=g).double()
    noise = torch.randn(9, 12, generator=g).double()
    leaves = [each.clone().requires_grad_() for each in (codes.values, weight, bias)]
    sparse = sparse_decode(replace(codes, values=leaves[0]), *leaves[1:])
    found = torch.autograd.grad((sparse * noise).sum(), leaves)
    others = [each.clone().requires_grad_() for each in (dense, weight, bias)]
    wanted = torch.autograd.grad(((others[0] @ others[1] + others[2]) * noise).sum(), others)
    torch.testing.assert_close(found[0], wanted[0][dense != 0])
    torch.testing.assert_close(found[1:], wanted[1:])


@pytest.mark.parametrize("odd", [torch.nan, torch.inf], ids=str)
def test_values_that_are_not_finite_go_where_they_are_used_alone(isa: str, odd: float):
    dense, codes = make(12, 20, dtype=torch.float32)
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(12, 70, generator=g), torch.randn(20, 70, generator=g)
    row, column = (int(each) for each in dense.nonzero()[5])
    weight[column, 3], x[row, 2] = odd, odd
    y = sparse_decode(codes, weight)
    assert torch.equal(~y[:, 3].isfinite(), dense[:, column] != 0)
    assert y[:, torch.arange(70) != 3].isfinite().all()
    total = sparse_outer(codes, x)
    assert torch.equal(~total[:, 2].isfinite(), dense[row] != 0)
    assert total[:, torch.arange(70) != 2].isfinite().all()
    dots = sparse_dots(codes, x, weight)
    at_row, at_column = dense.nonzero().T
    assert torch.equal(~dots.isfinite(), (at_row == row) | (at_column == column))
    values = codes.values.clone()
    values[4] = odd
    sums = sparse_column_sums(replace(codes, values=values))
    assert torch.equal((~sums.isfinite()).nonzero(), codes.columns[4:5, None].long())


def test_a_code_of_zero_that_is_an_entry_counts():
    codes = replace(make(2, 3, 1.0, torch.float32)[1], values=torch.zeros(6))
    weight = torch.full((3, 2), torch.inf)
    assert sparse_decode(codes, weight).isnan().all()


def test_every_instruction_set_sums_in_the_same_order(isa: str):
    """Up to what fused multiply-adds leave out in rounding: the portable kernels have none."""
    if isa == "portable":
        pytest.skip("has no fused multiply-adds")
    assert NATIVE is not None
    _, codes = make(40, 30, 0.5, torch.float32)
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(40, 150, generator=g), torch.randn(30, 150, generator=g)
    calls: list[Callable[[], Tensor]] = [
        lambda: sparse_decode(codes, weight),
        lambda: sparse_outer(codes, x),
        lambda: sparse_dots(codes, x, weight),
    ]
    here = [call() for call in calls]
    NATIVE.use_isa("avx2")
    assert all(torch.equal(a, call()) for a, call in zip(here, calls, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_gradients_at_once_are_those_one_by_one(isa: str, dtype: torch.dtype):
    _, codes = make(40, 30, 0.5, dtype)
    g = torch.Generator().manual_seed(4)
    weight, noise = (torch.randn(n, 150, generator=g).to(dtype) for n in (30, 40))
    values = codes.values.requires_grad_()
    both = torch.autograd.grad(
        sparse_decode(codes, weight.requires_grad_()), [values, weight], noise
    )
    one, two = (
        torch.autograd.grad(sparse_decode(codes, weight), each, noise)[0]
        for each in (values, weight)
    )
    assert torch.equal(both[0], one) and torch.equal(both[1], two)


def test_types_of_results_and_gradients():
    dense, codes = make(6, 9, dtype=torch.float32)
    weight = torch.randn(9, 8).bfloat16().requires_grad_()
    values = codes.values.requires_grad_()
    y = sparse_decode(codes, weight)
    assert y.dtype == torch.bfloat16
    wide = sparse_decode(codes, weight, dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), y)
    wide.square().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert values.grad is not None and values.grad.dtype == torch.float32
    exact = 2 * wide.detach() @ weight.detach().float().T
    torch.testing.assert_close(values.grad, exact[dense != 0], rtol=1e-5, atol=1e-5)


def test_the_public_functions_compile_without_graph_breaks():
    _, codes = make(6, 9, dtype=torch.float32)
    x, weight = torch.randn(6, 8), torch.randn(9, 8)

    def call(values: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        mine = replace(codes, values=values)
        dots = sparse_dots(mine, x, weight)
        return sparse_decode(mine, weight), dots, sparse_outer(mine, x), sparse_column_sums(mine)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = codes.values, x, weight
    for found, wanted in zip(compiled(*arguments), call(*arguments), strict=True):
        assert torch.equal(found, wanted)


CODES = make(3, 4, 0.5, torch.float32)[1]
X, W = torch.ones(3, 5), torch.ones(4, 5)
BEYOND = replace(CODES, columns=CODES.columns + 4)
MORE = replace(CODES, row_ptr=CODES.row_ptr + 100)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: sparse_decode(CODES, X), r"4 columns, so weight must be \[4, d\] of .*\[3, 5\]"),
        (lambda: sparse_decode(CODES, W[0]), r"must be \[4, d\] of .*float32 \[5\]"),
        (lambda: sparse_decode(CODES, W.long()), "of float32, .*; got torch.int64"),
        (lambda: sparse_decode(CODES, W.double()), "float64 goes with float64 alone"),
        (lambda: sparse_decode(CODES, W, torch.ones(4)), r"bias must be \[5\] there, got \[4\]"),
        (lambda: sparse_outer(CODES, W), r"3 rows and 4 columns, so rows must be \[3, d\]"),
        (lambda: sparse_dots(CODES, X, W[:, :2]), "rows have 5 columns, weight has 2"),
        (lambda: sparse_dots(CODES, X, W.to("meta")), "codes are on cpu, weight is on meta"),
        (
            lambda: sparse_column_sums(replace(CODES, values=CODES.values.long())),
            "values must be float32, .*, got torch.int64",
        ),
    ],
)
def test_wrong_inputs_say_what_is_wrong(wrong: Callable[[], Tensor], text: str):
    with pytest.raises(InvalidInput, match=text):
        wrong()


@pytest.mark.parametrize(
    "call",
    [
        lambda codes: sparse_decode(codes, W),
        lambda codes: sparse_dots(codes, X, W),
        lambda codes: sparse_outer(codes, X),
        sparse_column_sums,
    ],
    ids=["decode", "dots", "outer", "column_sums"],
)
def test_entries_that_lead_out_of_memory_are_refused(call: Callable[[SparseRows], Tensor]):
    largest = int(BEYOND.columns.max())
    with pytest.raises(InvalidInput, match=f"an entry has column {largest}, there are 4 columns"):
        call(BEYOND)
    text = rf"row_ptr counts \d+ entries, there is room for {MORE.slots}; select them again"
    with pytest.raises(InvalidInput, match=text):
        call(MORE)


@NEEDS_NATIVE
def test_the_kernels_refuse_what_they_would_follow_blindly():
    assert NATIVE is not None
    good = {
        "row_ptr": CODES.row_ptr,
        "columns": CODES.columns,
        "values": CODES.values,
        "weight": W,
        "bias": None,
        "out": torch.empty(3, 5),
    }
    down = CODES.row_ptr.clone()
    down[1] = -1
    for other, text in [
        ({"row_ptr": CODES.row_ptr.int()}, "row_ptr must be dense int64"),
        ({"row_ptr": down}, "row_ptr must ascend"),
        ({"columns": CODES.columns.long()}, "columns must be dense int32"),
        ({"values": CODES.values[:-1]}, "values must be dense"),
        ({"values": CODES.values.double()}, "values must be dense"),
        ({"weight": W.T.contiguous().T}, "with dense rows"),
        ({"bias": torch.ones(4)}, "bias must be dense"),
        ({"out": torch.empty(3, 4)}, "out must be dense"),
        ({"out": torch.empty(3, 5).bfloat16()}, "out must be dense"),
    ]:
        with pytest.raises(ValueError, match=text):
            NATIVE.sparse_decode_cpu(*(good | other).values(), 1)
    raw = CODES.row_ptr, CODES.columns
    with pytest.raises(ValueError, match="one row for each row"):
        NATIVE.sparse_outer_cpu(*raw, CODES.values, W, torch.empty(4, 5), 1)
    with pytest.raises(ValueError, match="rows must be"):
        NATIVE.sparse_dots_cpu(*raw, W, W, torch.empty(len(CODES.values)), 1)
    with pytest.raises(ValueError, match="out must be dense"):
        NATIVE.sparse_dots_cpu(*raw, X, W, torch.empty(2), 1)
    with pytest.raises(ValueError, match="sums are of the type"):
        NATIVE.sparse_column_sums_cpu(*raw, CODES.values, torch.empty(4).bfloat16())
