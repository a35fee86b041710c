"""Encoding and selecting at once: against the two done apart, gradients, and what is refused."""

import sys

import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import batch_topk, encode_select, encode_select_reference, topk
from tests.cases._matrices import identical
from tests.cases.encode_select import LARGE, Case

NATIVE = _register.native()[0]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small matrix has many."""
    module = sys.modules["dreamreader.ops.encode_select"]
    monkeypatch.setattr(module, "_BLOCK", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", ["topk", "batch_topk", "threshold"])
@pytest.mark.parametrize("pool", [None, 0.6])
def test_blocks_do_not_show(rule: str, pool: float | None, dtype: torch.dtype, small_blocks: None):
    count = {"topk": 9, "batch_topk": 700, "threshold": 0}[rule]
    for odd in (0.0, torch.nan, -torch.inf):
        case = Case((80, 6, 1000), rule, count, pool, each=True, odd=odd)
        args = case.arguments(dtype)
        found = torch.ops.dreamreader.encode_select(*args)
        wanted = encode_select_reference(*args)
        identical(case, list(found), list(wanted), [])


@pytest.mark.parametrize("rule", ["topk", "batch_topk"])
def test_ties_and_rows_of_another_size_in_blocks(rule: str, small_blocks: None):
    """One row that no sample saw outweighs all; then everything is equal; then nothing is left."""
    x = torch.ones(64, 2)
    weight = torch.ones(900, 2)
    for change in ({"scale": 1000.0}, {"scale": 1.0}, {"scale": -1.0}):
        rows = x.clone()
        rows[5] *= change["scale"]
        rows = rows if change["scale"] > 0 else -x
        for count in (3, 500, 899, 901, 64 * 900):
            args = rows, weight, None, rule, count, None, None, 0
            found = torch.ops.dreamreader.encode_select(*args)
            identical(None, list(found), list(encode_select_reference(*args)), [])


def test_it_is_the_encoder_and_the_selection():
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=g) for shape in ((50, 20), (300, 20), (300,)))
    a = torch.addmm(bias, x, weight.T)
    apart, at_once = batch_topk(a, 400), encode_select(x, weight, bias, count=400)
    assert torch.equal(apart.row_ptr, at_once.row_ptr)
    assert torch.equal(apart.columns, at_once.columns)
    torch.testing.assert_close(apart.values, at_once.values)
    assert torch.equal(
        topk(a, 7).columns, encode_select(x, weight, bias, rule="topk", count=7).columns
    )


def test_gradients_are_those_of_the_dense_product():
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((6, 5), (40, 5), (40,))
    ]
    codes = encode_select(*tensors, count=30)
    towards = torch.randn(6, 40, generator=g, dtype=torch.float64)
    x, weight, bias = tensors
    dense = torch.addmm(bias, x, weight.T) * (codes.dense() != 0)
    found = torch.autograd.grad((codes.dense() * towards).sum(), tensors)
    wanted = torch.autograd.grad((dense * towards).sum(), tensors)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_there_is_room_for_all_above_a_threshold():
    x, weight = torch.ones(2, 1), torch.ones(700, 1)
    codes = encode_select(x, weight, rule="threshold", threshold=torch.tensor(0.5))
    assert int(codes.count()) == 1400 and torch.equal(codes.dense(), torch.ones(2, 700))


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
def test_the_dense_activations_never_exist(monkeypatch: pytest.MonkeyPatch):
    rows, width, largest = 2048, 8192, []
    x, weight = torch.randn(rows, 8), torch.randn(width, 8)
    module = sys.modules["dreamreader._alloc"]
    empty = module.empty

    def watched(shape, **options) -> Tensor:
        largest.append(torch.Size(shape).numel())
        return empty(shape, **options)

    monkeypatch.setattr(module, "empty", watched)
    encode_select(x, weight, count=8 * rows)
    assert max(largest) * 8 <= rows * width


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.ones(3, 5)}, "x has 2 features, weight takes 5"),
        (
            {"weight": torch.ones(3, 2).double()},
            "weight is torch.float64 on cpu, x is torch.float32",
        ),
        ({"bias": torch.ones(4)}, r"bias must be \[3\], got \[4\]"),
        ({"rule": "top"}, "rule must be one of topk, batch_topk, threshold, got top"),
        ({"rule": "threshold"}, "a threshold goes with the rule threshold"),
        ({"threshold": torch.zeros(())}, "a threshold goes with the rule threshold"),
        ({"rule": "threshold", "threshold": torch.zeros(2)}, r"float32 \[\] or \[3\]"),
        ({"count": -1}, "count must be 0 or more, got -1"),
        ({"pool": torch.tensor([0, 3]).int()}, "must ascend, from 0 to below 3"),
        ({"x": torch.ones(2)}, r"x must be \[rows, columns\]"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(change: dict, text: str):
    right = {"x": torch.ones(4, 2), "weight": torch.ones(3, 2)}
    with pytest.raises(InvalidInput, match=f"encode_select: .*{text}"):
        encode_select(**(right | change))


def test_large_cases_have_many_blocks():
    """What `test_results_do_not_depend_on_threads` runs is more than one block."""
    case = LARGE[0]
    assert case.shape[0] * case.shape[2] * 2 > 2 * (4 << 20)
