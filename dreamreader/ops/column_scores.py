"""Scores of the columns of activations: norms, entropy over rows, ridge leverage."""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader import _alloc
from dreamreader._register import Kernel, native, register
from dreamreader.ops._arguments import check_choice
from dreamreader.ops._selection import check_matrix, dense_rows, eligible

TRITON = "dreamreader.triton_kernels.column_scores"
SUMMED = ("l2", "l2_squared", "entropy", "entropy_low")
SCORES = (*SUMMED, "leverage", "uniform")
_RIDGE = 0.01


def column_scores(x: Float[Tensor, "rows width"], score: str = "l2") -> Float[Tensor, " width"]:
    """Scores every column of activations over the rows of a batch; no gradient flows here.

    Formula, with a = relu(x), S = sum_i a_i and p = a / S of one column:
        l2: sqrt(sum a^2); l2_squared: sum a^2; entropy: H = -sum p log p (0 log 0 = 0), in nats;
        entropy_low: 1 / (1 + H); leverage: a' (A A' + 0.01 I)^-1 a with A [rows, width];
        uniform: 1. A column without a positive entry has a score of 0, but for uniform.

    Args:
        x: activations before or after relu, float32, bfloat16, float16 or float64.
        score: one of the above. Leverage takes rows^2 * width operations, in float64.

    Returns:
        float32 [width], new memory; NaN where the column has one.

    Raises:
        InvalidInput: x is not [rows, width] of floating point, or there is no such score.

    Example:
        >>> import torch
        >>> column_scores(torch.tensor([[3.0, -1.0], [4.0, 0.0]]), "l2").tolist()
        [5.0, 0.0]

    Reference:
        Ridge leverage: Alaoui and Mahoney, Fast randomized kernel ridge regression with statistical
        guarantees (2015), definition 1, with samples and features exchanged.
    """
    check_matrix("column_scores", x)
    check_choice("column_scores", "score", score, SCORES)
    x = x.detach()
    if score == "uniform":
        return x.new_ones(x.shape[1], dtype=torch.float32)
    return _leverage(x) if score == "leverage" else _column_scores(x, score)


def column_scores_reference(x: Tensor, score: str) -> Tensor:
    """The definition of `column_scores` in plain torch, on any device.

    Args:
        x: [n, F].
        score: one of SUMMED.

    Returns:
        float32 [F].
    """
    a = eligible(x).double()
    if score in ("l2", "l2_squared"):
        squares = a.square().sum(0)
        return (squares.sqrt() if score == "l2" else squares).float()
    total = a.sum(0)
    entropy = total.log() - torch.special.xlogy(a, a).sum(0) / total
    found = entropy if score == "entropy" else 1 / (1 + entropy)
    return torch.where(total == 0, 0.0, found).float()


def _leverage(x: Tensor) -> Tensor:
    a = eligible(x).double()
    gram = a @ a.T + _RIDGE * torch.eye(len(a), dtype=a.dtype, device=a.device)
    factor, failed = torch.linalg.cholesky_ex(gram)  # fails where there are NaN, and says NaN then
    scores = torch.linalg.solve_triangular(factor, a, upper=False).square().sum(0)
    return torch.where(failed > 0, torch.nan, scores).float()


def _cpu(x: Tensor, score: str) -> Tensor:
    found = _fake(x, score)
    _native.column_scores_cpu(dense_rows(x), score, found, torch.get_num_threads())
    return found


def _triton(x: Tensor, score: str) -> Tensor:
    kernel = import_module(TRITON)
    if not kernel.supported(x):
        return column_scores_reference(x, score)
    found = _fake(x, score)
    kernel.column_scores(dense_rows(x), score, found)
    return found


def _fake(x: Tensor, score: str) -> Tensor:
    return _alloc.empty((x.shape[1],), dtype=torch.float32, device=x.device)


_native: Any = native()[0]

_column_scores = register(
    "column_scores",
    "(Tensor x, str score) -> Tensor",
    reference=column_scores_reference,
    fake=_fake,
    cpu=Kernel("column_scores_cpu", _cpu),
    triton=Kernel(TRITON, _triton),
)
