"""Cross moments of paired rows: what linear maps are fitted and measured from, in one pass."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput

_BLOCK = 4096  # rows of a product: adding it up costs nothing beside it
_BUFFER = 2**24  # numbers that wait for it, 128 MB


class CrossMoments:
    """Number, means and products of paired rows, batch by batch: memory grows with no row.

    Rows wait in a buffer until there are enough for one product, so that batches of any size cost
    the same. Each product is of differences from its own mean and is joined with those before, so
    that means far from 0, or that drift, cost no digits. All is float64.

    Formula: for n_a and n_b rows with d = mean_b - mean_a:  mean = mean_a + d n_b / n,
        scatter = sum w (u - mean)(u - mean)' = scatter_a + scatter_b + d d' n_a n_b / n
        with u = (x, y); the last term goes into the product as one more row.

    Args:
        d_source, d_target: widths of x and y.
        gram: whether products of y with itself are kept, which similarities (CKA) need; else its
            squares by dimension alone.
        device: of the sums.

    Attributes:
        rows: how many were added with a weight above 0.

    Example:
        >>> found = CrossMoments(2, 1)
        >>> found.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0], [6.0]]))
        >>> found.source_mean.tolist(), found.cross_scatter.tolist()
        ([2.0, 0.0], [[4.0], [0.0]])

    Reference:
        Chan, Golub and LeVeque, Algorithms for computing the sample variance (1983).
    """

    def __init__(
        self,
        d_source: int,
        d_target: int,
        *,
        gram: bool = False,
        device: torch.device | str = "cpu",
    ):
        for name, size in (("d_source", d_source), ("d_target", d_target)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InvalidInput(f"moments of pairs: {name} is at least 1, got {size!r}")
        self.d_source, self.d_target, self.gram = d_source, d_target, gram
        self.rows = 0
        self.device = torch.device(device)
        width = d_source + d_target
        wide = {"dtype": torch.float64, "device": self.device}
        self._weight = 0.0  # of the rows that are summed
        self._mean = torch.zeros(width, **wide)
        self._cross = torch.zeros(d_source, width, **wide)
        self._target = torch.zeros(*([d_target] * (2 if gram else 1)), **wide)
        self._block = max(1, min(_BLOCK, _BUFFER // width))
        self._waiting: Tensor | None = None  # [block + 1, width], made with the first row
        self._weights = torch.ones(self._block, **wide)
        self._filled, self._weighted = 0, False

    def add(
        self,
        x: Float[Tensor, "*rows d_source"],
        y: Float[Tensor, "*rows d_target"],
        weights: Tensor | None = None,
    ) -> None:
        """Adds pairs of rows.

        Args:
            x, y: of any floating point type.
            weights: [*rows], 1 each by default; rows of weight 0, such as padding, do not exist.

        Raises:
            InvalidInput: shapes do not fit, or a value that counts is not finite; then nothing is
                added.
        """
        one, other = self._flat("source", x, self.d_source), self._flat("target", y, self.d_target)
        if x.shape[:-1] != y.shape[:-1]:
            raise InvalidInput(
                f"moments of pairs: as many rows on both sides are needed, got {list(x.shape[:-1])}"
                f" and {list(y.shape[:-1])}"
            )
        weight = None
        if weights is not None:
            if weights.shape != x.shape[:-1]:
                raise InvalidInput(
                    f"moments of pairs: weights must be {list(x.shape[:-1])}, got "
                    f"{list(weights.shape)}"
                )
            weight = weights.reshape(-1).to(self.device, torch.float64)
            if not bool((weight.isfinite() & (weight >= 0)).all()):
                raise InvalidInput("moments of pairs: weights are finite and at least 0")
            kept = weight > 0
            if not bool(kept.all()):
                one, other = one[kept.to(one.device)], other[kept.to(other.device)]
                weight = weight[kept]
        _check_rows("source", one)
        _check_rows("target", other)
        self.rows += len(one)
        while len(one):
            count = self._take(one, other, weight)
            one, other = one[count:], other[count:]
            weight = None if weight is None else weight[count:]

    @property
    def weight(self) -> float:
        """Sum of the weights; the number of rows where each weighs 1."""
        self._flush()
        return self._weight

    @property
    def source_mean(self) -> Float[Tensor, " d_source"]:
        self._flush()
        return self._mean[: self.d_source]

    @property
    def target_mean(self) -> Float[Tensor, " d_target"]:
        self._flush()
        return self._mean[self.d_source :]

    @property
    def source_scatter(self) -> Float[Tensor, "d_source d_source"]:
        """Sum of w (x - mean)(x - mean)'."""
        self._flush()
        return self._cross[:, : self.d_source]

    @property
    def cross_scatter(self) -> Float[Tensor, "d_source d_target"]:
        """Sum of w (x - mean)(y - mean)'."""
        self._flush()
        return self._cross[:, self.d_source :]

    @property
    def target_squares(self) -> Float[Tensor, " d_target"]:
        """Sum of w (y - mean)^2 by dimension."""
        self._flush()
        return self._target.diagonal() if self.gram else self._target

    @property
    def target_scatter(self) -> Float[Tensor, "d_target d_target"]:
        """Sum of w (y - mean)(y - mean)'.

        Raises:
            InvalidInput: they were not kept.
        """
        if not self.gram:
            raise InvalidInput(
                "products of the target with itself were not kept; ask for gram=True"
            )
        self._flush()
        return self._target

    def __add__(self, other: "CrossMoments") -> "CrossMoments":
        """The moments of both, for instance from two processes.

        Raises:
            InvalidInput: they are of other widths, or keep something else.
        """
        if not isinstance(other, CrossMoments):
            return NotImplemented
        mine, theirs = (
            (each.d_source, each.d_target, "with" if each.gram else "without")
            for each in (self, other)
        )
        if mine != theirs:
            raise InvalidInput(
                "moments of {} -> {} features {} gram cannot be joined with those of {} -> {} "
                "features {} gram".format(*mine, *theirs)
            )
        found = CrossMoments(self.d_source, self.d_target, gram=self.gram, device=self.device)
        parts = [each for each in (self, other) if each.weight]
        found.rows = self.rows + other.rows
        found._weight = sum(each._weight for each in parts)
        for part in parts:
            found._mean += part._mean.to(self.device) * (part._weight / found._weight)
            found._cross += part._cross.to(self.device)
            found._target += part._target.to(self.device)
        if len(parts) == 2:
            apart = (other._mean.to(self.device) - self._mean) * math.sqrt(
                self._weight * other._weight / found._weight
            )
            found._join(apart.unsqueeze(0))
        return found

    def through(
        self, weight: Float[Tensor, "d_new d_source"], bias: Float[Tensor, " d_new"]
    ) -> "CrossMoments":
        """Moments of the pairs (W x + b, y), as if those rows had been added."""
        found = CrossMoments(len(weight), self.d_target, gram=self.gram, device=self.device)
        w, b = weight.to(self._mean), bias.to(self._mean)
        cross = torch.cat([w @ self.source_scatter @ w.T, w @ self.cross_scatter], 1)
        found._mean = torch.cat([w @ self.source_mean + b, self.target_mean])
        found._cross, found._target = cross, self._target.clone()
        found.rows, found._weight = self.rows, self._weight
        return found

    def _flat(self, side: str, value: Tensor, width: int) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(f"moments of pairs: {side} must be floating point, got {kind}")
        if value.dim() < 2 or value.shape[-1] != width:
            raise InvalidInput(
                f"moments of pairs: {side} must be [..., rows, {width}], got {list(value.shape)}"
            )
        return value.detach().reshape(-1, width)

    def _take(self, x: Tensor, y: Tensor, weight: Tensor | None) -> int:
        """Copies the first rows to those that wait; how many."""
        if self._waiting is None:
            self._waiting = self._mean.new_empty(self._block + 1, len(self._mean))
        count = min(len(x), self._block - self._filled)
        own = slice(self._filled, self._filled + count)
        self._waiting[own, : self.d_source] = x[:count]
        self._waiting[own, self.d_source :] = y[:count]
        self._weights[own] = 1.0 if weight is None else weight[:count]
        self._weighted |= weight is not None
        self._filled += count
        if self._filled == self._block:
            self._flush()
        return count

    def _flush(self) -> None:
        """Joins the rows that wait with the sums."""
        if not self._filled:
            return
        assert self._waiting is not None
        block, w = self._waiting[: self._filled + 1], self._weights[: self._filled]
        total = float(w.sum())
        mean = (w @ block[:-1]) / total
        block[:-1] -= mean
        if self._weighted:
            block[:-1] *= w.sqrt().unsqueeze(1)
        weight = self._weight + total
        apart = mean - self._mean
        block[-1] = apart * math.sqrt(self._weight * total / weight)
        self._join(block)
        self._mean += apart * (total / weight)
        self._weight, self._filled, self._weighted = weight, 0, False

    def _join(self, block: Tensor) -> None:
        """Adds the products of rows [n, width] that are differences from means."""
        source, target = block[:, : self.d_source], block[:, self.d_source :]
        self._cross.addmm_(source.T, block)
        if self.gram:
            self._target.addmm_(target.T, target)
        else:
            self._target += target.square().sum(0)


def _check_rows(side: str, rows: Tensor) -> None:
    bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InvalidInput(
            f"moments of pairs: {len(bad)} of {len(rows)} {side} rows are not finite, the first is "
            f"row {bad[0]} of those that count"
        )
