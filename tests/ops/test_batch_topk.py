"""Properties of the largest entries of a batch, and what must be refused."""

import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows, batch_topk
from tests.cases._matrices import VALUES, matrix

NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


def same(a: SparseRows, b: SparseRows) -> bool:
    parts = (a.row_ptr, b.row_ptr), (a.columns, b.columns), (a.values, b.values)
    return all(torch.equal(*map(torch.nan_to_num, pair)) for pair in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_torch(dtype: torch.dtype):
    x = matrix("giant_row", (70, 1200), dtype)
    codes = batch_topk(x, 2000)
    wanted = torch.topk(x.float().flatten(), 2000).values
    assert torch.equal(codes.values.sort(descending=True).values.float(), wanted)
    assert codes.threshold is not None and float(codes.threshold) == float(wanted[-1])
    assert torch.equal(codes.dense()[codes.dense() > 0].sort().values, codes.values.sort().values)


def test_equal_entries_are_taken_in_flat_order():
    codes = batch_topk(torch.full((300, 400), 2.0), 950)
    assert codes.row_counts().tolist() == [400, 400, 150] + [0] * 297
    assert torch.equal(codes.columns, (torch.arange(950) % 400).int())
    assert float(codes.threshold or 0) == 2.0


@NEEDS_NATIVE
def test_a_bound_without_a_sample_needs_no_more_memory_than_entries():
    x = matrix("equal", (400, 512), torch.float32) + torch.arange(400)[:, None] * 1e-3
    count = 100
    out = torch.empty(count), torch.empty(401, dtype=torch.int64), torch.empty(count).int()
    smallest = torch.empty(())
    selector = NATIVE.BlockSelector("batch_topk", x, 400, 1, count, None)
    looks, done = 0, False
    while not done:
        selector.begin(1)
        selector.add(0, x, 0, 1)
        looks, done = looks + 1, selector.done(1)
    assert 3 < looks < 40  # the range of bounds was halved
    selector.emit(*out, smallest, 1)
    assert float(smallest) == float(x.max()) and torch.equal(out[2], torch.arange(100).int())


def test_fewer_than_asked_for():
    x = torch.tensor([[1.0, -1.0], [0.0, 3.0]])
    codes = batch_topk(x, 3)
    assert codes.row_ptr.tolist() == [0, 1, 2] and codes.columns.tolist() == [0, 1, -1]
    assert codes.threshold is not None and float(codes.threshold) == 0
    exactly = batch_topk(x, 2)
    assert exactly.threshold is not None and float(exactly.threshold) == 1


@pytest.mark.parametrize("values", VALUES)
def test_a_pool_of_all_columns_is_no_pool(values: str):
    x = matrix(values, (60, 1300), torch.bfloat16)
    pool = torch.arange(1300, dtype=torch.int32)
    assert same(batch_topk(x, 900, pool), batch_topk(x, 900))


def test_a_pool_of_k_columns_keeps_every_positive_entry_of_it():
    x, pool = matrix("normal", (60, 1300), torch.float32), torch.arange(7, 1300, 99).int()
    codes = batch_topk(x, 60 * len(pool), pool)
    assert torch.equal(codes.dense()[:, pool], x[:, pool].relu())
    assert int(codes.count()) == int((x[:, pool] > 0).sum())


@NEEDS_NATIVE
@pytest.mark.parametrize("count", [1, 2, 3])
def test_more_entries_than_32_bits_can_count(count: int):
    """Windows of a short vector: the first and the last of them see one entry each."""
    rows, width = 70_000, 32_768
    memory = torch.zeros(rows + width - 1, dtype=torch.bfloat16)
    memory[0], memory[-1] = 5, 7
    codes = batch_topk(memory.as_strided((rows, width), (1, 1)), count)
    places = codes.row_of().tolist(), codes.columns.tolist()
    last = [rows - 1, width - 1]
    wanted = [last] if count == 1 else [[0, 0], last, [-1, -1]][:count]
    assert [list(each) for each in zip(*places, strict=True)] == wanted


def test_a_bound_that_a_sample_cannot_tell():
    """All large entries lie side by side, where no sample may look, or be all that it sees."""
    x = torch.rand(100, 3000)
    for part in (x[:, :40], x[17], x[::9, 100:140]):
        part += 10
    flat = x.flatten()
    for count in (10, 1000, 8000, 9000, 40_000):
        order = flat.sort(descending=True, stable=True).indices[:count].sort().values
        codes = batch_topk(x, count)
        assert torch.equal(codes.row_of() * 3000 + codes.columns, order)


def test_the_gradient_goes_to_what_was_kept_and_not_through_the_threshold():
    x = torch.tensor([[1.0, 3.0], [2.0, 0.0]], requires_grad=True)
    codes = batch_topk(x, 2)
    assert codes.threshold is not None and not codes.threshold.requires_grad
    (grad,) = torch.autograd.grad((codes.values * torch.tensor([10.0, 20.0])).sum(), x)
    assert grad.tolist() == [[0.0, 10.0], [20.0, 0.0]]


def test_compiles_without_graph_breaks():
    def dense(x: Tensor) -> Tensor:
        return batch_topk(x, 20).dense()

    x = matrix("normal", (5, 40), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), dense(x))


@pytest.mark.parametrize(
    ("pool", "text"),
    [
        (torch.tensor([0, 1]), r"pool must be int32 \[columns\] on cpu, got int64 \[2\] on cpu"),
        (torch.tensor([[0]]).int(), r"pool must be int32 \[columns\] on cpu, got int32 \[1, 1\]"),
        (torch.tensor([1, 0]).int(), "must ascend, from 0 to below 4"),
        (torch.tensor([1, 1]).int(), "must ascend, from 0 to below 4"),
        (torch.tensor([1, 4]).int(), "must ascend, from 0 to below 4"),
        (torch.tensor([-1, 2]).int(), "must ascend, from 0 to below 4"),
    ],
)
def test_wrong_pools_say_what_is_wrong(pool: Tensor, text: str):
    with pytest.raises(InvalidInput, match=f"batch_topk: the .*{text}"):
        batch_topk(torch.ones(2, 4), 2, pool)


def test_wrong_inputs_say_what_is_wrong():
    with pytest.raises(InvalidInput, match="batch_topk: count must be 0 or more, got -5"):
        batch_topk(torch.ones(2, 4), -5)
    with pytest.raises(InvalidInput, match=r"batch_topk: x must be .* got float32 \[2, 4, 1\]"):
        batch_topk(torch.ones(2, 4, 1), 1)


@NEEDS_NATIVE
def test_the_kernel_refuses_what_it_would_follow_blindly():
    x, row_ptr = torch.ones(2, 4), torch.zeros(3).long()
    columns, values, threshold = torch.zeros(3).int(), torch.zeros(3), torch.zeros(())
    out = values, row_ptr, columns, threshold
    call = NATIVE.batch_topk_cpu  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="there must be `count` slots"):
        call(x, 4, None, *out, 1)
    with pytest.raises(ValueError, match="dense in a row"):
        call(x.T, 3, None, *out, 1)
    with pytest.raises(ValueError, match="columns of the pool must ascend"):
        call(x, 3, torch.tensor([1, 4]).int(), *out, 1)
    with pytest.raises(ValueError, match=r"row_ptr must be int64 \[rows \+ 1\]"):
        call(x, 3, None, values, row_ptr[:2], columns, threshold, 1)
    with pytest.raises(ValueError, match="values must be dense, in the dtype of x"):
        call(x, 3, None, values.double(), *out[1:], 1)
