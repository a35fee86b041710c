"""Streaming statistics of labelled rows: counts, means, variances and, on request, covariances."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import moments

Keep = Literal["moments", "covariance", "rows"]
KEEPS: tuple[Keep, ...] = ("moments", "covariance", "rows")

# A difference that is so much smaller than what it is taken of has lost six digits of sixteen.
CANCELLED = 1e6


class Statistics:
    """What is known of labelled rows, batch by batch: memory does not grow with their number.

    Of every label the mean and the sums of what differs from it are kept, in float64, and joined
    with those of the next batch. A mean far from 0 costs no digits of the variance, a row far from
    all others none of another label's, and batches come in any sizes and order.

    Formula: for n_a and n_b rows with d = mean_b - mean_a:  mean = mean_a + d n_b / n,
        scatter = sum (x_i - mean)(x_i - mean)' = scatter_a + scatter_b + d d' n_a n_b / n

    Args:
        keep: `moments` keeps counts, means and variances; `covariance` the products of all pairs of
            features too, [labels, steps, features, features]; `rows` the rows, as float64 where
            they come so and as float32 otherwise, on the CPU.

    Example:
        >>> found = Statistics()
        >>> found.add(torch.tensor([[[1.0]], [[3.0]], [[9.0]]]), torch.tensor([0, 0, 1]))
        >>> found.count([0]), found.mean([0]).tolist(), found.variance([0]).tolist()
        (2, [[2.0]], [[1.0]])

    Reference:
        Chan, Golub and LeVeque, Algorithms for computing the sample variance (1983).
    """

    def __init__(self, keep: Keep = "moments"):
        if keep not in KEEPS:
            raise UnknownName("kind of statistics", keep, KEEPS)
        self.keep: Keep = keep
        self._shape: tuple[int, int] | None = None
        self._sums = _MomentSums.none()
        self._rows: list[tuple[Tensor, Tensor]] = []

    @property
    def shape(self) -> tuple[int, int] | None:
        """Steps and features, None before the first row."""
        return self._shape

    @property
    def labels(self) -> int:
        """One more than the largest label so far."""
        return len(self._sums.counts)

    def add(
        self,
        rows: Float[Tensor, "rows steps features"],
        labels: Int[Tensor, " rows"],
        count: int | None = None,
    ) -> None:
        """Adds rows; those with a negative label are left out.

        Args:
            rows: to add.
            labels: a number for each.
            count: how many labels there are, where that is known; else one more than the largest.

        Raises:
            InvalidInput: the steps or features differ from those before, or a value is not finite;
                then nothing is added.
        """
        if rows.dim() != 3 or (self.shape is not None and rows.shape[1:] != self.shape):
            had = list(self.shape or ("steps", "features"))
            raise InvalidInput(f"[steps, features] is {list(rows.shape[1:])}, before {had}")
        if not len(rows):
            return
        labels = labels.to(rows.device)
        count = max(int(labels.max()) + 1 if count is None else count, self.labels)
        found = _sums(rows, labels, count, self.keep == "covariance")
        if not bool(found.mean.isfinite().all()):
            raise InvalidInput("values are not finite")
        self._shape = (rows.shape[1], rows.shape[2])
        self._sums = _join(self._sums, found)
        if self.keep == "rows":
            self._rows.append((rows.to("cpu", kept_type(rows)), labels.cpu()))

    def merge(self, other: "Statistics") -> None:
        """Adds what another one has seen, for instance in another process.

        Raises:
            InvalidInput: it keeps something else, or its steps or features differ.
        """
        if other.shape is None:
            return
        if other.keep != self.keep or self.shape not in (None, other.shape):
            raise InvalidInput(
                f"statistics of {other.keep} {list(other.shape)} cannot be merged into those of "
                f"{self.keep} {list(self.shape or ())}"
            )
        self._shape = other.shape
        self._sums = _join(self._sums, other._sums)
        self._rows += other._rows

    def count(self, labels: Sequence[int]) -> int:
        """Rows of these labels together."""
        return int(self._sums.counts[self._keep_known(labels)].sum())

    def mean(self, labels: Sequence[int]) -> Float[Tensor, "steps features"]:
        """Mean of the rows of these labels, float64; NaN where there are none."""
        return self._spread(labels)[1]

    def variance(self, labels: Sequence[int]) -> Float[Tensor, "steps features"]:
        """Mean squared distance of the rows of these labels from their mean, float64."""
        found, _, away = self._spread(labels)
        n = found.counts[:, None, None]
        return (found.square + n * away.square()).sum(0) / n.sum()

    def scatter(self, labels: Sequence[int], step: int) -> Float[Tensor, "features features"]:
        """Sum of (x - mean)(x - mean)' over the rows of these labels at a step, float64.

        Raises:
            InvalidInput: neither products nor rows were kept.
        """
        if self.keep == "rows":
            rows = self.rows(labels, step)
            centred = rows - rows.mean(0)
            return centred.T @ centred
        if self.keep != "covariance":
            raise InvalidInput("covariances were not kept; ask for keep='covariance' or 'rows'")
        found, _, away = self._spread(labels)
        away = away[:, step]  # [labels, features]
        return found.products[:, step].sum(0) + (found.counts[:, None] * away).T @ away

    def rows(self, labels: Sequence[int], step: int) -> Float[Tensor, "n features"]:
        """The rows of these labels at a step in the order in which they came, float64.

        Raises:
            InvalidInput: rows were not kept.
        """
        if self.keep != "rows":
            raise InvalidInput("rows were not kept; ask for keep='rows'")
        wanted = torch.tensor(list(labels))
        parts = [rows[torch.isin(own, wanted), step] for rows, own in self._rows]
        return torch.cat(parts).double()

    def _keep_known(self, labels: Sequence[int]) -> list[int]:
        return [label for label in labels if label < self.labels]

    def _spread(self, labels: Sequence[int]) -> "tuple[_MomentSums, Tensor, Tensor]":
        """What is known of these labels, their common mean, and how far each label's is from it."""
        assert self.shape is not None
        known = self._keep_known(labels)
        found = _MomentSums(*(each[known] if len(each) else each for each in self._sums))
        if not int(found.counts.sum()):
            return found, found.mean.new_full(self.shape, torch.nan), found.mean
        most = int(found.counts.argmax())  # differences from a mean that is near keep their digits
        away = (found.mean - found.mean[most]) + (found.rest - found.rest[most])
        away[found.counts == 0] = 0
        common = (found.counts[:, None, None] * away).sum(0) / found.counts.sum()
        return found, found.mean[most] + (found.rest[most] + common), away - common


class _MomentSums(NamedTuple):
    """What is known of each label.

    Attributes:
        counts: int64 [labels].
        mean, rest: float64 [labels, steps, features], the mean is the sum of both: what rounding to
            float64 took is in the second; 0 for a label without rows.
        square: of differences from the mean, like it.
        products: the same of all pairs of features, [labels, steps, features, features], or [0].
    """

    counts: Tensor
    mean: Tensor
    rest: Tensor
    square: Tensor
    products: Tensor

    @staticmethod
    def none() -> "_MomentSums":
        """Of no label."""
        empty = torch.zeros(0, dtype=torch.float64)
        return _MomentSums(torch.zeros(0, dtype=torch.int64), empty, empty, empty, empty)


def kept_type(rows: Tensor) -> torch.dtype:
    """The type that rows are kept in: no digit is lost, and half the memory where it holds them."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _sums(rows: Tensor, labels: Tensor, count: int, products: bool) -> _MomentSums:
    """What one batch [rows, steps, features] says of each label."""
    x = rows.flatten(1)
    shift = x[0].double()
    counts, total, square = moments(x, labels, count, shift=shift)
    n = counts.clamp(min=1).unsqueeze(1)
    total /= n
    centred = (square - n * total.square()).clamp(min=0)
    mean = shift + total
    rest = total - (mean - shift)
    if bool((square > CANCELLED * centred).any()):  # digits are lost: rows are far from the shift
        mean, rest, centred = _twice(x, labels, mean)
    mean[counts == 0] = 0
    mean, rest, centred = (each.unflatten(1, rows.shape[1:]) for each in (mean, rest, centred))
    pairs = _products(rows, labels, mean) if products else mean[:0]
    return _MomentSums(counts, mean, rest, centred, pairs)


def _twice(x: Tensor, labels: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, its rest and sum of squares of [rows, features] by label, from means that are near."""
    own = labels >= 0
    x, labels = x[own].double(), labels[own]
    n = labels.bincount(minlength=len(mean)).clamp(min=1).unsqueeze(1)
    rest = torch.zeros_like(mean)
    for _ in range(2):  # the second time from the mean as rounded
        away = x - mean[labels]
        rest = torch.zeros_like(mean).index_add_(0, labels, away) / n
        mean, before = mean + rest, mean
        rest = rest - (mean - before)
    square = torch.zeros_like(mean).index_add_(0, labels, (x - mean[labels]).square())
    return mean, rest, square


def _products(rows: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """[labels, steps, features, features]: sums of d d' with d = x - mean of the label."""
    found = [(rows[labels == n].double() - mean).transpose(0, 1) for n, mean in enumerate(means)]
    return torch.stack([each.transpose(1, 2) @ each for each in found])


def _join(a: _MomentSums, b: _MomentSums) -> _MomentSums:
    """The sums of both, with all labels of both."""
    labels = max(len(a.counts), len(b.counts))
    if not labels or not len(a.counts):
        return b
    a, b = _pad(a, labels), _pad(b, labels)
    counts = a.counts + b.counts
    n, n_b = (each[:, None, None].double() for each in (counts.clamp(min=1), b.counts))
    both = a.counts[:, None, None] * n_b / n
    d = (b.mean - a.mean) + (b.rest - a.rest)
    products = a.products + b.products
    if len(products):
        products += both.unsqueeze(3) * d.unsqueeze(3) * d.unsqueeze(2)
    step = a.rest + d * (n_b / n)
    mean = a.mean + step
    square = a.square + b.square + both * d.square()
    return _MomentSums(counts, mean, step - (mean - a.mean), square, products)


def _pad(sums: _MomentSums, labels: int) -> _MomentSums:
    """With labels without rows at the end."""
    more = labels - len(sums.counts)
    return _MomentSums(
        *(torch.cat([x, x.new_zeros(more, *x.shape[1:])]) if len(x) and more else x for x in sums)
    )
