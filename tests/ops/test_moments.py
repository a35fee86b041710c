"""Properties of the moments of labelled rows, and what must be refused."""

import numpy as np
import pytest
import torch

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import moments
from tests.cases.moments import Case

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")

by_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@by_dtype
def test_sums_are_those_of_numpy_in_double(dtype: torch.dtype):
    x, labels, shift = Case("numpy", (333, 17)).inputs(dtype)
    wide = x.double().numpy() - shift.numpy()
    found = moments(x, labels, 3, shift=shift)
    for label in range(3):
        rows = wide[labels.numpy() == label]
        np.testing.assert_allclose(found.total[label], rows.sum(0), rtol=1e-13, atol=1e-12)
        np.testing.assert_allclose(found.square[label], (rows**2).sum(0), rtol=1e-13)
        assert int(found.rows[label]) == len(rows)


def test_float32_is_not_added_in_float32():
    rows, labels = torch.full((20_000, 3), 0.1), torch.zeros(20_000, dtype=torch.int64)
    total = moments(rows, labels, 1).total
    assert float((total - 20_000 * rows[0].double()).abs().max()) < 1e-9


def test_values_that_are_not_finite_stay_with_their_label():
    x = torch.ones(6, 3)
    x[1, 0], x[4, 2] = torch.nan, torch.inf
    total = moments(x, torch.tensor([0, 0, 1, 1, 1, 2]), 3).total
    assert total[0].isnan().tolist() == [True, False, False]
    assert total[1].tolist() == [3.0, 3.0, torch.inf]
    assert total[2].tolist() == [1.0, 1.0, 1.0]


def test_rows_that_require_grad_are_summed_without_one():
    x = torch.ones(2, 2, requires_grad=True)
    assert not moments(x, torch.zeros(2, dtype=torch.int64), 1).total.requires_grad


def test_rows_without_features_are_counted():
    found = moments(torch.zeros(4, 0), torch.tensor([0, 1, 0, -1]), 2)
    assert found.rows.tolist() == [2, 1] and found.total.shape == found.square.shape == (2, 0)


def test_compiles_without_graph_breaks():
    x, labels, _ = Case("compiled", (40, 9)).inputs(torch.float32)
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(compiled(x, labels, 3), moments(x, labels, 3), strict=True):
        assert torch.equal(mine, eager)
    with pytest.raises(InvalidInput, match="2 labels are announced, the largest is 2"):
        compiled(x, labels, 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x, n: moments(x[0], n, 2),
            r"\[rows, features\] of float32, .*, got",
        ),
        (lambda x, n: moments(x.long(), n, 2), r"got int64 \[4, 3\]"),
        (lambda x, n: moments(x, n[:3], 2), r"labels must be int64 \[4\], got int64 \[3\]"),
        (lambda x, n: moments(x, n.int(), 2), r"labels must be int64 \[4\], got int32 \[4\]"),
        (lambda x, n: moments(x, n, 1), "1 labels are announced, the largest is 1"),
        (lambda x, n: moments(x[:0], n[:0], -1), "-1 labels are announced, 0 or more are possible"),
        (
            lambda x, n: moments(x, n, 2, shift=torch.zeros(3)),
            r"shift must be float64 \[3\] on cpu, got float32 \[3\] on cpu",
        ),
        (
            lambda x, n: moments(x, n, 2, shift=torch.zeros(2, dtype=torch.float64)),
            r"shift must be float64 \[3\] on cpu, got float64 \[2\]",
        ),
    ],
)
def test_wrong_inputs_say_what_is_wrong(call, text):
    with pytest.raises(InvalidInput, match=text):
        call(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))


@NEEDS_NATIVE
def test_the_kernel_refuses_what_it_would_follow_blindly():
    x, labels, shift = Case("raw", (4, 3)).inputs(torch.float32)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="a label is outside the table"):
        NATIVE.moments_cpu(x, labels * 0 + 2, shift, counts, sums, sums.clone(), 1)
    with pytest.raises(ValueError, match="sums must be dense float64"):
        NATIVE.moments_cpu(x, labels * 0, shift, counts, sums.float(), sums.clone(), 1)
    with pytest.raises(ValueError, match="float64 are possible"):
        NATIVE.moments_cpu(x.long(), labels * 0, shift, counts, sums, sums.clone(), 1)
