"""Which learned direction stands for which true one: cosines, the best pairing, and its score."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dreamreader.errors import InvalidInput


@dataclass(frozen=True)
class Pairing:
    """Pairs of rows and columns, each at most once, with the largest sum of what they are worth.

    Attributes:
        rows, columns: int64 [pairs], ascending in rows; as many pairs as the shorter side has.
        row_prices, column_prices: of the dual problem; no entry exceeds the sum of its two prices,
            pairs equal it, and columns without a pair cost 0: proof that no sum is larger. Of the
            transposed table where it has more rows than columns.
    """

    rows: Int[Tensor, " pairs"]
    columns: Int[Tensor, " pairs"]
    row_prices: Float[Tensor, " rows"]
    column_prices: Float[Tensor, " columns"]


def cosines(
    a: Float[Tensor, "first d"], b: Float[Tensor, "second d"]
) -> Float[Tensor, "first second"]:
    """Cosines of all rows of a with all rows of b, in float32 at least; 0 for rows of zeros.

    Raises:
        InvalidInput: they are no matrices of one width, or hold what is not finite.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise InvalidInput(
            "cosines: two matrices of the same width are needed, got "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    sides = []
    for name, side in (("first", a), ("second", b)):
        wide = side.detach().to(b.device, dtype)
        if not bool(wide.isfinite().all()):
            raise InvalidInput(f"cosines: the {name} matrix has values that are not finite")
        sides.append(wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-8))
    return sides[0] @ sides[1].T


def pair(worth: Float[Tensor, "rows columns"]) -> Pairing:
    """Pairs rows with columns so that the sum of the worths of the pairs is the largest.

    Shortest augmenting paths on the dual problem. Rows whose best column nobody else has keep it
    for nothing; only the others search, each search reading a row of the table per step.

    Args:
        worth: [rows, columns], finite.

    Raises:
        InvalidInput: it is no matrix, or holds what is not finite.

    Example:
        >>> import torch
        >>> pairs = pair(torch.tensor([[3.0, 2.0], [2.5, 0.0]]))
        >>> pairs.rows.tolist(), pairs.columns.tolist()  # 2 + 2.5 is more than 3 + 0
        ([0, 1], [1, 0])

    Reference:
        Jonker and Volgenant, A shortest augmenting path algorithm (1987).
    """
    if worth.dim() != 2:
        raise InvalidInput(f"pair: a table [rows, columns] is needed, got {list(worth.shape)}")
    if not bool(worth.isfinite().all()):
        raise InvalidInput("pair: the table has values that are not finite")
    turned = worth.shape[0] > worth.shape[1]
    cost = -(worth.T if turned else worth).detach().cpu().float().contiguous().numpy()
    search = _Search(cost)
    column = torch.from_numpy(search.run())
    row = torch.arange(len(column))
    prices = (torch.from_numpy(-search.row_price), torch.from_numpy(-search.column_price))
    if turned:
        order = column.argsort()
        row, column = column[order], row[order]
    return Pairing(row, column, *prices)


class _Search:
    """Least cost of pairs, rows <= columns. Prices are float64, so that they add up."""

    def __init__(self, cost: NDArray[np.float32]) -> None:
        self.cost = cost
        rows, columns = cost.shape
        self.row_price = cost.min(1).astype(np.float64) if columns else np.zeros(rows)
        self.column_price = np.zeros(columns)
        self.column_of = np.full(rows, -1)
        self.row_of = np.full(columns, -1)

    def run(self) -> NDArray[np.int64]:
        if not self.cost.size:
            return self.column_of
        for row, column in enumerate(self.cost.argmin(1)):
            if self.row_of[column] < 0:
                self.column_of[row], self.row_of[column] = column, row
        for row in np.flatnonzero(self.column_of < 0).tolist():
            self._augment(row)
        return self.column_of

    def _augment(self, start: int) -> None:
        """Gives a row a column, moving the rows along the cheapest path, and mends the prices."""
        columns = len(self.column_price)
        distance = np.full(columns, np.inf)
        open_ = np.zeros(columns)  # inf where the distance is final
        via = np.empty(columns, dtype=np.int64)
        row, so_far = start, 0.0
        done_rows, done_columns = [start], []
        while True:
            reach = self.cost[row] - self.column_price
            reach += so_far - self.row_price[row]
            reach += open_  # rounding must not find a shorter way to what is final
            better = reach < distance
            np.minimum(distance, reach, out=distance)
            via[better] = row
            column = int((distance + open_).argmin())
            so_far = distance[column]
            open_[column] = np.inf
            if self.row_of[column] < 0:
                break
            row = self.row_of[column]
            done_rows.append(row)
            done_columns.append(column)
        gone = distance[done_columns] if done_columns else np.zeros(0)
        self.row_price[start] += so_far
        self.row_price[done_rows[1:]] += so_far - gone
        self.column_price[done_columns] -= so_far - gone
        while True:
            row = via[column]
            self.row_of[column] = row
            self.column_of[row], column = column, self.column_of[row]
            if row == start:
                return


def mean_correlation(a: Float[Tensor, "first d"], b: Float[Tensor, "second d"]) -> float:
    """The mean correlation coefficient (MCC): mean |cosine| of the best one-to-one pairs of rows.

    Of decoder and true directions, or of the decoders of two seeds; min(first, second) pairs.

    Raises:
        InvalidInput: one of them has no rows, or they have different widths.

    Example:
        >>> import torch
        >>> mean_correlation(torch.eye(3), -torch.eye(3)[[2, 0, 1]])
        1.0

    Reference:
        Song et al., Mechanistic interpretability should prioritize feature consistency in SAEs,
        arXiv:2505.20254.
    """
    similar = cosines(a, b).abs()
    if not similar.numel():
        raise InvalidInput(f"mean_correlation: no rows in {list(a.shape)} or {list(b.shape)}")
    pairs = pair(similar)
    return float(similar[pairs.rows, pairs.columns].double().mean())


def uniqueness(a: Float[Tensor, "first d"], b: Float[Tensor, "second d"]) -> float:
    """How many rows of b are the most similar one (|cosine|) of some row of a, for each row of a.

    1 where every row of a follows another row of b.
    """
    similar = cosines(a, b).abs()
    if not similar.numel():
        raise InvalidInput(f"uniqueness: no rows in {list(a.shape)} or {list(b.shape)}")
    return len(similar.argmax(1).unique()) / len(similar)
