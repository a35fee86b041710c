"""The largest entries of a batch inside of a pool of columns that their scores choose."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops._arguments import check_choice, check_count, refuse
from dreamreader.ops.batch_topk import batch_topk
from dreamreader.ops.column_scores import column_scores
from dreamreader.ops.sparse_rows import SparseRows

RULES = ("top", "sampled")


def choose_pool(
    scores: Float[Tensor, " width"],
    size: int,
    rule: str = "top",
    generator: torch.Generator | None = None,
) -> Int[Tensor, " size"]:
    """Chooses columns by their scores.

    Formula: top: the first `size` columns by descending score, then by ascending column, NaN first;
        sampled: the same of score / e with e ~ Exponential(1), which draws without replacement in
        proportion to the scores. Columns with a score of 0 come last.

    Args:
        scores: 0 or more, or NaN.
        size: how many columns, 0 or more; all where there are fewer.
        rule: top or sampled.
        generator: of `sampled`, on the device of scores; torch's own by default.

    Returns:
        int32 [min(size, width)], ascending, new memory.

    Raises:
        InvalidInput: scores are not [width] of floating point, size is no whole number or negative,
            there is no such rule, or the generator is on another device.

    Example:
        >>> import torch
        >>> choose_pool(torch.tensor([0.5, 3.0, 2.0, 3.0]), 2).tolist()
        [1, 3]

    Reference:
        Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006), algorithm A-ES.
    """
    if not isinstance(scores, Tensor) or scores.dim() != 1 or not scores.is_floating_point():
        refuse("choose_pool", "scores", "floating point [width]", scores)
    check_count("choose_pool", "size", size)
    check_choice("choose_pool", "rule", rule, RULES)
    if generator is not None:
        _check_generator(generator, scores)
    scores = scores.detach()
    if rule == "sampled":
        noise = torch.empty_like(scores, dtype=torch.float64).exponential_(generator=generator)
        scores = scores / noise
    order = torch.sort(scores, descending=True, stable=True).indices[:size]
    return order.sort().values.int()


def _check_generator(generator: torch.Generator, scores: Tensor) -> None:
    wanted = f"a torch.Generator on {scores.device}"
    if not isinstance(generator, torch.Generator):
        refuse("choose_pool", "the generator", wanted, generator)
    if generator.device != scores.device:
        raise InvalidInput(
            f"choose_pool: the generator must be {wanted}, got one on {generator.device}"
        )


def sampled_topk(
    x: Float[Tensor, "rows width"],
    count: int,
    size: int | None = None,
    *,
    score: str = "l2",
    rule: str = "top",
    generator: torch.Generator | None = None,
    pool: Int[Tensor, " columns"] | None = None,
) -> SparseRows:
    """Keeps the `count` largest positive entries of all rows inside of a pool of columns.

    Formula: batch_topk(x, count, pool), pool = choose_pool(column_scores(x, score), size, rule)

    Args:
        x: activations before or after relu, float32, bfloat16, float16 or float64.
        count: entries in all: for k a row, k * rows.
        size: columns in the pool: for k a row and a factor l, round(k * l). With l = 1 every
            positive entry of the pool is kept; a pool of all columns is `batch_topk`.
        score: of `column_scores`.
        rule: of `choose_pool`, with its generator.
        generator: a seed for `sampled`.
        pool: the columns themselves, of an earlier call; then nothing is scored.

    Returns:
        As `batch_topk`.

    Raises:
        InvalidInput: both or none of size and pool are given, or what the functions above refuse.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.0, 5.0]])
        >>> sampled_topk(x, 2, size=1).columns.tolist()
        [2, 2]
    """
    if (size is None) == (pool is None):
        raise InvalidInput("sampled_topk: give the size of the pool, or the pool itself")
    if pool is None:
        assert size is not None
        pool = choose_pool(column_scores(x, score), size, rule, generator)
    return batch_topk(x, count, pool)
