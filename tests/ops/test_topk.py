"""Properties of the largest entries of each row, and what must be refused."""

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.ops import topk
from tests.cases._matrices import matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_are_those_of_torch(dtype: torch.dtype):
    """torch promises no order of ties, but their values."""
    x = matrix("half_ties", (30, 800), dtype)
    codes = topk(x, 20)
    wanted = torch.topk(x.float(), 20).values
    found = codes.values.view(30, 20).sort(descending=True).values
    assert torch.equal(found.float(), wanted)
    columns = codes.columns.view(30, 20)
    assert (columns.diff() > 0).all()
    assert torch.equal(x.gather(1, columns.long()), codes.values.view(30, 20))


def test_equal_entries_are_taken_from_the_left():
    assert topk(torch.ones(2, 50), 3).columns.tolist() == [0, 1, 2, 0, 1, 2]


def test_what_is_not_positive_is_never_kept():
    x = torch.tensor([[-1.0, 0.0, -0.0, -torch.inf], [2.0, -3.0, torch.nan, torch.inf]])
    codes = topk(x, 3)
    assert codes.row_ptr.tolist() == [0, 0, 3]
    assert codes.columns.tolist() == [0, 2, 3, -1, -1, -1]


def test_the_gradient_goes_to_what_was_kept():
    x = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
    codes = topk(x, 2)
    (codes.values * torch.tensor([10.0, 20.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 10.0, 20.0]]


def test_wrong_inputs_say_what_is_wrong():
    with pytest.raises(InvalidInput, match=r"topk: x must be \[rows, columns\] .* got int64 \[3\]"):
        topk(torch.arange(3), 1)
    with pytest.raises(InvalidInput, match="topk: k must be 0 or more, got -1"):
        topk(torch.ones(2, 2), -1)
