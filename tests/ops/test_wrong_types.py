"""What operators of autoencoders say to arguments of a wrong type."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dreamreader.errors import InvalidInput
from dreamreader.ops import (
    SparseRows,
    batch_topk,
    choose_pool,
    column_scores,
    encode_select,
    sampled_topk,
    sparse_column_sums,
    sparse_decode,
    sparse_dots,
    sparse_outer,
    threshold_select,
    topk,
)

X, WEIGHT = torch.ones(2, 4), torch.ones(3, 4)
CODES = SparseRows.from_dense(torch.ones(2, 3))
WHOLE = "must be a whole number, 0 or more, got"
encode = partial(encode_select, X, WEIGHT)
rows_of = partial(SparseRows, CODES.row_ptr, CODES.columns, CODES.values)

POOL = torch.tensor([0, 1], dtype=torch.int32)
DENSE = r"must be dense, as x.to_dense\(\) gives it, got float32 \[2, 4\], sparse_"

CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: topk(X, 2**70), f"topk: k must be below 2\\^63, got {2**70}"),
    (lambda: batch_topk(X, 2**63), "batch_topk: count must be below"),
    (lambda: encode(count=np.uint64(2**63)), "encode_select: count must be below"),
    (lambda: topk(X.to_sparse(), 2), f"topk: x {DENSE}coo"),
    (lambda: batch_topk(X.to_sparse(), 2), f"batch_topk: x {DENSE}coo"),
    (lambda: column_scores(X.to_sparse()), f"column_scores: x {DENSE}coo"),
    (lambda: encode_select(X, X.to_sparse()), f"encode_select: weight {DENSE}coo"),
    (lambda: batch_topk(X, 2, POOL.to_sparse()), "the pool must be dense, .* got int32"),
    (lambda: encode(WEIGHT[:, 0].to_sparse()), "encode_select: bias must be dense"),
    (lambda: sparse_decode(CODES, WEIGHT.to_sparse()), "sparse_decode: weight must be dense"),
    (lambda: topk(X, 2.5), rf"topk: k {WHOLE} 2.5 \(float\)"),
    (lambda: topk(X, True), rf"topk: k {WHOLE} True \(bool\)"),
    (lambda: topk(X, None), f"topk: k {WHOLE} None"),
    (lambda: topk(X, torch.tensor(2)), rf"topk: k {WHOLE} int64 \[\]"),
    (
        lambda: topk([[1.0]], 1),
        r"topk: x must be \[rows, columns\] of .*, got \[\[1.0\]\] \(list\)",
    ),
    (lambda: topk(X.numpy(), 1), r"topk: x must be .*, got array.* \(ndarray\)"),
    (lambda: batch_topk(X, "3"), rf"batch_topk: count {WHOLE} '3' \(str\)"),
    (lambda: batch_topk(X, 2, [0, 1]), r"the pool must be int32 \[columns\] on cpu, got \[0, 1\]"),
    (lambda: threshold_select(X, 1.0), r"float32 \[\] or \[4\] on cpu, got 1.0 \(float\)"),
    (lambda: threshold_select(X, torch.ones(4), 2.0), rf"select: slots {WHOLE} 2.0 \(float\)"),
    (lambda: column_scores(X, 2), r"score must be one of l2, .*, got 2 \(int\)"),
    (lambda: column_scores(None), r"column_scores: x must be \[rows, columns\] .*, got None"),
    (
        lambda: choose_pool([1.0], 1),
        r"scores must be floating point \[width\], got \[1.0\] \(list\)",
    ),
    (lambda: choose_pool(X[0], 1.5), rf"choose_pool: size {WHOLE} 1.5 \(float\)"),
    (lambda: choose_pool(X[0], 1, None), "rule must be one of top, sampled, got None"),
    (
        lambda: choose_pool(X[0], 1, "sampled", 7),
        r"the generator must be a torch.Generator on cpu, got 7 \(int\)",
    ),
    (lambda: sampled_topk(X, 2, 1.5), rf"size {WHOLE} 1.5 \(float\)"),
    (lambda: sampled_topk(X, 2.0, 1), rf"count {WHOLE} 2.0 \(float\)"),
    (lambda: sampled_topk(X, 2, pool=(0, 1)), r"the pool must be int32 .*, got \(0, 1\) \(tuple\)"),
    (lambda: encode(count=1.0), rf"encode_select: count {WHOLE} 1.0 \(float\)"),
    (lambda: encode(rule=None), "rule must be one of topk, batch_topk, threshold, got None"),
    (lambda: encode([0.0] * 3), r"bias must be a tensor or None, got \[0.0, 0.0, 0.0\] \(list\)"),
    (lambda: encode(pool=[0]), r"pool must be a tensor or None, got \[0\] \(list\)"),
    (
        lambda: encode(rule="threshold", threshold=0.5),
        "threshold must be a tensor or None, got 0.5",
    ),
    (lambda: encode(rule="threshold", threshold=X[0, 0], slots="9"), rf"slots {WHOLE} '9'"),
    (lambda: encode_select(X, WEIGHT.tolist()), r"weight must be \[rows, columns\] .* \(list\)"),
    (
        lambda: sparse_decode(X, WEIGHT),
        r"sparse_decode: codes must be SparseRows, .*float32 \[2, 4\]",
    ),
    (lambda: sparse_decode(CODES, WEIGHT.numpy()), "weight must be a tensor, got array"),
    (
        lambda: sparse_decode(CODES, WEIGHT, 0.0),
        r"bias must be a tensor or None, got 0.0 \(float\)",
    ),
    (
        lambda: sparse_decode(CODES, WEIGHT, dtype="float32"),
        r"dtype must be float32, .* of torch, or None, got 'float32' \(str\)",
    ),
    (lambda: sparse_decode(CODES, WEIGHT, dtype=torch.int64), "dtype must be .*, got torch.int64"),
    (lambda: sparse_dots(CODES, None, WEIGHT), "sparse_dots: rows must be a tensor, got None"),
    (lambda: sparse_dots(CODES, X, 3), r"sparse_dots: weight must be a tensor, got 3 \(int\)"),
    (lambda: sparse_dots(None, X, WEIGHT), "sparse_dots: codes must be SparseRows, .* got None"),
    (lambda: sparse_outer(CODES, [X]), r"sparse_outer: rows must be a tensor, got \[tensor"),
    (
        lambda: sparse_outer(CODES, X, dtype=float),
        r"dtype must be .*, got <class 'float'> \(type\)",
    ),
    (lambda: sparse_column_sums(X), r"column_sums: codes must be SparseRows, .*float32 \[2, 4\]"),
    (lambda: rows_of(3.0), rf"SparseRows: width {WHOLE} 3.0 \(float\)"),
    (lambda: rows_of(3, 0.5), r"SparseRows: threshold must be a tensor or None, got 0.5 \(float\)"),
    (
        lambda: SparseRows([0, 1], CODES.columns, CODES.values, 3),
        r"SparseRows: row_ptr must be a tensor, got \[0, 1\] \(list\)",
    ),
    (lambda: SparseRows.from_dense([[1.0]]), r"SparseRows: x must be \[rows, width\], got \[\[1.0"),
]


@pytest.mark.parametrize(("call", "text"), CASES, ids=[text for _, text in CASES])
def test_a_wrong_type_says_what_was_expected(call: Callable[[], Any], text: str):
    with pytest.raises(InvalidInput, match=text):
        call()


def test_whole_numbers_of_numpy_are_taken():
    assert topk(X, np.int64(2)).slots == batch_topk(X, np.int32(4)).slots == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused() -> None:
    with pytest.raises(InvalidInput, match="topk: x must be dense, .* got float32, nested"):
        topk(torch.nested.as_nested_tensor([X]), 2)
