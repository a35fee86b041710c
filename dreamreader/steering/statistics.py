"""Streaming statistics of labelled rows: counts, means, variances and, on request, covariances."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import moments

Keep = Literal["moments", "covariance", "rows"]
KEEPS: tuple[Keep, ...] = ("moments", "covariance", "rows")


class Statistics:
    """What is known of labelled rows, batch by batch: memory does not grow with their number.

    All sums are float64 and of differences from one point, the first row that came, so that a mean
    far from 0 costs no digits of the variance, and batches come in any sizes and order.

    Formula: with s the first row, d_i = x_i - s:  mean = s + (1/n) sum d_i,
        scatter = sum (x_i - mean)(x_i - mean)' = sum d_i d_i' - (1/n) (sum d_i)(sum d_i)'

    Args:
        keep: `moments` keeps counts, means and variances; `covariance` the products of all pairs of
            features too, [labels, steps, features, features]; `rows` the rows, as float32.

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
        self._shift: Float[Tensor, "steps features"] | None = None
        self._counts = torch.zeros(0, dtype=torch.int64)  # [labels]
        self._total = torch.zeros(0)  # [labels, steps, features]
        self._square = torch.zeros(0)
        self._products = torch.zeros(0)  # [labels, steps, features, features]
        self._rows: list[tuple[Tensor, Tensor]] = []

    @property
    def shape(self) -> tuple[int, int] | None:
        """Steps and features, None before the first row."""
        return None if self._shift is None else (self._shift.shape[0], self._shift.shape[1])

    @property
    def labels(self) -> int:
        """One more than the largest label so far."""
        return len(self._counts)

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
        shift = rows[0].double() if self._shift is None else self._shift
        shift = shift.to(rows.device)
        count = max(int(labels.max()) + 1 if count is None else count, self.labels)
        sums = moments(rows.flatten(1), labels.to(rows.device), count, shift=shift.flatten())
        if not bool(sums.total.isfinite().all()) or not bool(shift.isfinite().all()):
            raise InvalidInput("values are not finite")
        self._shift = shift
        self._counts = _added(self._counts, sums.rows)
        self._total = _added(self._total, sums.total.unflatten(1, shift.shape))
        self._square = _added(self._square, sums.square.unflatten(1, shift.shape))
        if self.keep == "covariance":
            self._products = _added(self._products, _products(rows, labels, count, shift))
        elif self.keep == "rows":
            self._rows.append((rows.to("cpu", torch.float32), labels.cpu()))

    def merge(self, other: "Statistics") -> None:
        """Adds what another one has seen, for instance in another process.

        Raises:
            InvalidInput: it keeps something else, or its steps or features differ.
        """
        if other._shift is None:
            return
        if other.keep != self.keep or self.shape not in (None, other.shape):
            raise InvalidInput(
                f"statistics of {other.keep} {list(other.shape or ())} cannot be merged into those "
                f"of {self.keep} {list(self.shape or ())}"
            )
        self._shift = other._shift if self._shift is None else self._shift
        moved = other._shift - self._shift  # [steps, features]
        n = other._counts[:, None, None]
        total = other._total + n * moved
        square = other._square + 2 * moved * other._total + n * moved.square()
        self._counts = _added(self._counts, other._counts)
        self._total = _added(self._total, total)
        self._square = _added(self._square, square)
        if self.keep == "covariance":
            cross = other._total[..., :, None] * moved[:, None, :]
            same = n[..., None] * moved[:, :, None] * moved[:, None, :]
            products = other._products + cross + cross.transpose(-1, -2) + same
            self._products = _added(self._products, products)
        self._rows += other._rows

    def count(self, labels: Sequence[int]) -> int:
        """Rows of these labels together."""
        return sum(int(self._counts[label]) for label in labels if label < self.labels)

    def mean(self, labels: Sequence[int]) -> Float[Tensor, "steps features"]:
        """Mean of the rows of these labels, float64; NaN where there are none."""
        assert self._shift is not None
        return self._shift + _of(self._total, labels) / self.count(labels)

    def variance(self, labels: Sequence[int]) -> Float[Tensor, "steps features"]:
        """Mean squared distance of the rows of these labels from their mean, float64."""
        n = self.count(labels)
        found = _of(self._square, labels) / n - (_of(self._total, labels) / n).square()
        return found.clamp(min=0)

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
        total = _of(self._total, labels)[step]  # [features]
        return _of(self._products, labels)[step] - torch.outer(total, total) / self.count(labels)

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


def _of(sums: Tensor, labels: Sequence[int]) -> Tensor:
    return sums[[label for label in labels if label < len(sums)]].sum(0)


def _added(sums: Tensor, more: Tensor) -> Tensor:
    """The sum, with more labels than before where they are new."""
    if not len(sums):
        return more.clone()
    if len(more) < len(sums):
        sums, more = more, sums
    out = more.clone()
    out[: len(sums)] += sums.to(out.device)
    return out


def _products(rows: Tensor, labels: Tensor, count: int, shift: Tensor) -> Tensor:
    """[labels, steps, features, features]: sums of d d' with d = x - shift."""
    found = [(rows[labels == label].double() - shift).transpose(0, 1) for label in range(count)]
    return torch.stack([each.transpose(1, 2) @ each for each in found])
