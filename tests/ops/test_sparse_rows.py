"""Rows of few entries: there and back, counts, gradients, and what must be refused."""

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows

X = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0] * 4, [torch.nan, 0.0, 0.0, 5.0]])


def padded(x: torch.Tensor, empty: int = 3) -> SparseRows:
    """With slots behind the last entry."""
    exact = SparseRows.from_dense(x)
    columns = torch.cat([exact.columns, torch.full((empty,), -1, dtype=torch.int32)])
    return SparseRows(exact.row_ptr, columns, torch.cat([exact.values, torch.zeros(empty)]), 4)


@pytest.mark.parametrize("empty", [0, 3])
def test_there_and_back(empty: int):
    codes = padded(X, empty)
    assert torch.equal(codes.dense().nan_to_num(9), X.nan_to_num(9))
    assert (codes.rows, codes.slots, int(codes.count())) == (3, 4 + empty, 4)
    assert codes.row_of().tolist() == [0, 0, 2, 2] + [-1] * empty
    assert codes.row_counts().tolist() == [2, 0, 2]
    assert codes.column_counts().tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 5)])
def test_without_entries(shape: tuple[int, int]):
    codes = SparseRows.from_dense(torch.zeros(shape))
    assert torch.equal(codes.dense(), torch.zeros(shape))
    assert codes.column_counts().tolist() == [0] * shape[1]


def test_the_gradient_of_the_values_comes_from_their_places():
    x = torch.tensor([[0.0, 2.0], [3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad((SparseRows.from_dense(x).dense() * weight).sum(), x)
    assert found.tolist() == [[0.0, 2.0], [3.0, 0.0]]


def test_other_dtype_and_device():
    codes = padded(X)
    codes = SparseRows(codes.row_ptr, codes.columns, codes.values, 4, torch.tensor(2.0))
    moved = codes.to("meta", torch.float16)
    assert moved.values.dtype == torch.float16 and moved.columns.dtype == torch.int32
    assert moved.threshold is not None and moved.threshold.dtype == torch.float16
    devices = {moved.threshold.device, moved.row_ptr.device, moved.columns.device}
    assert {str(each) for each in devices} == {"meta"}
    assert codes.to().values.dtype == torch.float32


def test_compiles_without_graph_breaks():
    def both(row_ptr, columns, values):
        codes = SparseRows(row_ptr, columns, values, 4)
        return codes.dense(), codes.column_counts(), codes.row_of()

    codes = padded(X.nan_to_num(7))
    args = codes.row_ptr, codes.columns, codes.values
    torch.compiler.reset()
    found = torch.compile(both, fullgraph=True, backend="aot_eager")(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, both(*args), strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"row_ptr": torch.zeros(3)}, r"row_ptr must be int64 \[rows \+ 1\], got float32 \[3\]"),
        ({"row_ptr": torch.zeros(0).long()}, r"row_ptr must be int64 .* got int64 \[0\]"),
        ({"columns": torch.zeros(4).long()}, r"columns must be int32 \[slots\], got int64 \[4\]"),
        ({"values": torch.zeros(5)}, r"values \[5\] must have the shape of columns, \[4\]"),
        ({"values": torch.zeros(4, device="meta")}, "values on meta; move them to one device"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(change: dict, text: str):
    exact = SparseRows.from_dense(X)
    right = {"row_ptr": exact.row_ptr, "columns": exact.columns, "values": exact.values}
    with pytest.raises(InvalidInput, match=text):
        SparseRows(**(right | change), width=4)


def test_from_dense_needs_rows():
    with pytest.raises(InvalidInput, match=r"x must be \[rows, width\], got \[2, 3, 4\]"):
        SparseRows.from_dense(torch.zeros(2, 3, 4))
