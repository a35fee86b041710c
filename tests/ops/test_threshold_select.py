"""Properties of the entries above a threshold, and what must be refused."""

import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.ops import threshold_select
from tests.cases._matrices import matrix


def test_entries_are_those_of_a_comparison():
    x = matrix("normal", (50, 300), torch.float32)
    threshold = torch.randn(300)
    codes = threshold_select(x, threshold)
    assert torch.equal(codes.dense(), x.relu() * (x.relu() > threshold))


def test_the_threshold_is_compared_in_float32():
    """0.3 lies between two numbers of bfloat16."""
    below, above = torch.tensor(0.3).bfloat16(), torch.tensor([[0.298828125, 0.30078125]])
    assert above.bfloat16().float().equal(above) and float(below) in above[0].tolist()
    assert threshold_select(above.bfloat16(), torch.tensor(0.3)).columns[0] == 1


def test_there_is_room_for_all_and_with_slots_they_are_counted():
    x = torch.ones(3, 400)
    codes = threshold_select(x, torch.tensor(0.5))
    assert codes.slots == int(codes.count()) == 1200 and torch.equal(codes.dense(), x)
    short = threshold_select(x, torch.tensor(0.5), slots=10)
    assert short.row_ptr.tolist() == [0, 400, 800, 1200]
    assert short.columns.tolist() == [-1] * 10 and short.values.tolist() == [0.0] * 10


def test_nan():
    x = torch.tensor([[torch.nan, 1.0, torch.inf]])
    assert threshold_select(x, torch.tensor(2.0)).columns[:3].tolist() == [0, 2, -1]
    assert threshold_select(x, torch.tensor(torch.nan)).columns[:3].tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x: threshold_select(x, torch.zeros(3)),
            r"float32 \[\] or \[4\] on cpu, got float32",
        ),
        (lambda x: threshold_select(x, torch.zeros(4).double()), r"got float64 \[4\] on cpu"),
        (
            lambda x: threshold_select(x, torch.zeros(4), slots=-1),
            "slots must be 0 or more, got -1",
        ),
        (lambda x: threshold_select(x[0], torch.zeros(4)), r"x must be \[rows, columns\]"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(call, text):
    with pytest.raises(InvalidInput, match=f"threshold_select: .*{text}"):
        call(torch.ones(2, 4))
