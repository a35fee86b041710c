"""Cross moments of paired rows: what linear maps are fitted and measured from, in one pass."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.checks import as_tensor, check_rows, check_whole

_BLOCK = 4096  # rows of a product: adding it up costs nothing beside it
_BUFFER = 2**24  # numbers that wait for it, 128 MB
_CACHED = 2**17  # numbers that are copied at once, 1 MB
_SOURCE, _TARGET = False, True


class CrossMoments:
    """Number, means and products of paired rows, batch by batch: memory grows with no row.

    Rows wait in a buffer until there are enough for one product, so that batches of any size cost
    the same. Products are of differences from the mean of the first block, so that means far from 0
    cost no digits, and both of them (x with x, x with y) are one product. All is float64.

    Formula: of u = (x, y) and the shift c: t = sum w (u - c), S = sum w (x - c_x)(u - c)';
        mean = c + t / n, scatter = sum w (x - mean_x)(u - mean)' = S - t_x t' / n

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

    @torch.inference_mode(False)
    def __init__(
        self,
        d_source: int,
        d_target: int,
        *,
        gram: bool = False,
        device: torch.device | str = "cpu",
    ):
        d_source = check_whole("moments of pairs: d_source", d_source, 1)
        d_target = check_whole("moments of pairs: d_target", d_target, 1)
        self.d_source, self.d_target, self.gram = d_source, d_target, gram
        self.rows = 0
        self.device = torch.device(device)
        width = d_source + d_target
        wide = {"dtype": torch.float64, "device": self.device}
        self._weight = 0.0  # of the rows that are summed
        self._shift = torch.zeros(width, **wide)
        self._total = torch.zeros(width, **wide)
        self._cross = torch.zeros(d_source, width, **wide)  # S
        self._target = torch.zeros(*([d_target] * (2 if gram else 1)), **wide)
        self._block = max(1, min(_BLOCK, _BUFFER // width))
        self._waiting: Tensor | None = None  # [block, width], made with the first row
        self._piece = max(1, _CACHED // width)
        self._filled = 0

    @torch.inference_mode(False)
    def add(
        self,
        x: Float[Tensor, "*rows d_source"],
        y: Float[Tensor, "*rows d_target"],
        weights: Tensor | None = None,
    ) -> None:
        """Adds pairs of rows.

        Args:
            x, y: tensors or NumPy arrays, of any floating point type.
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
            weights = as_tensor("moments of pairs: weights", weights)
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
        return self._weight

    @property
    def source_mean(self) -> Float[Tensor, " d_source"]:
        return self._mean()[: self.d_source]

    @property
    def target_mean(self) -> Float[Tensor, " d_target"]:
        return self._mean()[self.d_source :]

    @property
    def source_scatter(self) -> Float[Tensor, "d_source d_source"]:
        """Sum of w (x - mean)(x - mean)'."""
        return self._scatter(self._cross[:, : self.d_source], _SOURCE, _SOURCE)

    @property
    def cross_scatter(self) -> Float[Tensor, "d_source d_target"]:
        """Sum of w (x - mean)(y - mean)'."""
        return self._scatter(self._cross[:, self.d_source :], _SOURCE, _TARGET)

    @property
    def target_squares(self) -> Float[Tensor, " d_target"]:
        """Sum of w (y - mean)^2 by dimension."""
        self._flush()
        squares = self._target.diagonal() if self.gram else self._target
        total = self._total[self.d_source :]
        return (squares - total.square() / (self._weight or 1.0)).clamp(min=0)

    @property
    def target_scatter(self) -> Float[Tensor, "d_target d_target"]:
        """Sum of w (y - mean)(y - mean)'.

        Raises:
            InvalidInput: they were not kept.
        """
        if not self.gram:
            raise InvalidInput("products of the target were not kept; ask for gram=True")
        return self._scatter(self._target, _TARGET, _TARGET)

    @torch.inference_mode(False)
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
        larger, smaller = (self, other) if self.weight >= other.weight else (other, self)
        found = CrossMoments(self.d_source, self.d_target, gram=self.gram, device=self.device)
        found.rows = self.rows + other.rows
        for part in (larger, smaller):
            found._take_sums(part)
        return found

    @torch.inference_mode(False)
    def through(
        self, weight: Float[Tensor, "d_new d_source"], bias: Float[Tensor, " d_new"]
    ) -> "CrossMoments":
        """Moments of the pairs (W x + b, y), as if those rows had been added."""
        self._flush()
        found = CrossMoments(len(weight), self.d_target, gram=self.gram, device=self.device)
        w, b, d = weight.to(self._total), bias.to(self._total), self.d_source
        found._shift = torch.cat([w @ self._shift[:d] + b, self._shift[d:]])
        found._total = torch.cat([w @ self._total[:d], self._total[d:]])
        found._cross = torch.cat([w @ self._cross[:, :d] @ w.T, w @ self._cross[:, d:]], 1)
        found._target = self._target.clone()
        found.rows, found._weight = self.rows, self._weight
        return found

    def part(self, source: slice, target: slice) -> "CrossMoments":
        """Moments of some dimensions of each side, as if only they had been added."""
        self._flush()
        d = self.d_source
        here = torch.arange(d, device=self.device)[source]
        there = torch.arange(self.d_target, device=self.device)[target]
        both = torch.cat([here, d + there])
        found = CrossMoments(len(here), len(there), gram=self.gram, device=self.device)
        found._shift, found._total = self._shift[both], self._total[both]
        found._cross = self._cross[source][:, both]
        found._target = (
            self._target[target, target] if self.gram else self._target[target]
        ).clone()
        found.rows, found._weight = self.rows, self._weight
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` goes on from, without the rows that wait: all are summed first."""
        self._flush()
        self._waiting = None
        counts = torch.tensor([self.rows, self._weight], dtype=torch.float64)
        return {
            "counts": counts,
            "shift": self._shift,
            "total": self._total,
            "cross": self._cross,
            "target": self._target,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the sums of other moments of the same widths in the place of its own.

        Raises:
            InvalidInput: they are of other widths, or keep something else.
        """
        own = self.state_dict()
        shapes = [{name: list(each.shape) for name, each in one.items()} for one in (own, state)]
        if shapes[0] != shapes[1]:
            raise InvalidInput(f"moments of pairs: sums of {shapes[0]} are needed, got {shapes[1]}")
        values = {name: each.to(own[name], copy=True) for name, each in state.items()}
        self.rows, self._weight = int(values["counts"][0]), float(values["counts"][1])
        self._shift, self._total = values["shift"], values["total"]
        self._cross, self._target = values["cross"], values["target"]

    def _mean(self) -> Tensor:
        """[width], of both sides."""
        return self._shift + self._total / (self._weight or 1.0)

    def _scatter(self, products: Tensor, one: bool, other: bool) -> Tensor:
        """Products about the means of two sides, from those about the shift."""
        self._flush()
        d = self.d_source
        left, right = (self._total[d:] if side else self._total[:d] for side in (one, other))
        return torch.addr(products, left, right, alpha=-1 / (self._weight or 1.0))

    def _take_sums(self, part: "CrossMoments") -> None:
        """Adds what another one has summed, about this one's shift."""
        part._flush()
        if not part._weight:
            return
        if not self._weight:
            self._shift = part._shift.to(self.device)
        d, n = self.d_source, part._weight
        apart = part._shift.to(self.device) - self._shift
        total = part._total.to(self.device)
        moved = total + n * apart  # sum of w (u - c) about this shift

        def products(sums: Tensor, left: slice, right: slice) -> Tensor:
            own = torch.addr(sums.to(self.device), total[left], apart[right])
            return own.addr_(apart[left], moved[right])

        self._cross += products(part._cross, slice(0, d), slice(None))
        if self.gram:
            self._target += products(part._target, slice(d, None), slice(d, None))
        else:
            self._target += part._target.to(self.device)
            self._target += total[d:] * apart[d:] + apart[d:] * moved[d:]
        self._total += moved
        self._weight += n

    def _flat(self, side: str, value: Tensor, width: int) -> Tensor:
        value = check_rows(f"moments of pairs: {side}", value)
        if value.dim() < 2 or value.shape[-1] != width:
            raise InvalidInput(
                f"moments of pairs: {side} must be [..., rows, {width}], got {list(value.shape)}"
            )
        return value.reshape(-1, width)

    def _take(self, x: Tensor, y: Tensor, weight: Tensor | None) -> int:
        """Copies the first rows to those that wait; how many."""
        if self._waiting is None:
            self._waiting = self._total.new_empty(self._block, len(self._total))
        if not self._weight:
            first = slice(0, self._block)
            self._shift = torch.cat([x[first].double().mean(0), y[first].double().mean(0)]).to(
                self.device
            )
        count, d = min(len(x), self._block - self._filled), self.d_source
        for start in range(0, count, self._piece):  # all that is done to it while it is in cache
            own = slice(start, min(start + self._piece, count))
            piece = self._waiting[self._filled + own.start : self._filled + own.stop]
            piece[:, :d], piece[:, d:] = x[own], y[own]
            piece -= self._shift
            if weight is None:
                self._total += piece.sum(0)
                self._weight += len(piece)
            else:
                self._total += weight[own] @ piece
                self._weight += float(weight[own].sum())
                piece *= weight[own].sqrt().unsqueeze(1)
            if not self.gram:
                self._target += piece[:, d:].square().sum(0)
        self._filled += count
        if self._filled == self._block:
            self._flush()
        return count

    @torch.inference_mode(False)
    def _flush(self) -> None:
        """Joins the products of the rows that wait with those before."""
        if not self._filled:
            return
        assert self._waiting is not None
        block = self._waiting[: self._filled]
        self._cross.addmm_(block[:, : self.d_source].T, block)
        if self.gram:
            target = block[:, self.d_source :]
            self._target.addmm_(target.T, target)
        self._filled = 0


def _check_rows(side: str, rows: Tensor) -> None:
    if bool(rows.sum().isfinite()):  # which it is of no sum with a value that is not
        return
    bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise InvalidInput(
            f"moments of pairs: {len(bad)} of {len(rows)} {side} rows are not finite, the first is "
            f"row {bad[0]} of those that count; no method takes them: leave them out, or give them "
            "the weight 0"
        )
