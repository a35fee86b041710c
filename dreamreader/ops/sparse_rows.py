"""Rows of which few entries are not zero, as selections give them: pointers, columns and values."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops._arguments import check_count, check_tensor


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Rows of which few entries are not zero (CSR), with room for the most there may be.

    There are as many slots as a selection could keep; entries fill the first `row_ptr[-1]` of
    them, so that no size depends on data and nothing waits for the device.

    Attributes:
        row_ptr: int64 [rows + 1]; entries of row i are those from row_ptr[i] to row_ptr[i + 1] - 1.
        columns: int32 [slots], ascending in a row; -1 in slots behind row_ptr[-1].
        values: [slots] in the dtype of the activations; 0 in those slots.
        width: number of columns.
        threshold: [], the smallest value that a selection with a budget kept (0 where fewer than
            that were eligible); None where there is no such value.

    Raises:
        InvalidInput: a tensor has another shape or dtype, or is on another device.

    Example:
        >>> import torch
        >>> codes = SparseRows.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
        >>> codes.row_ptr.tolist(), codes.columns.tolist(), codes.values.tolist()
        ([0, 1, 3], [1, 0, 2], [2.0, 1.0, 3.0])
    """

    row_ptr: Int[Tensor, " rows_plus_1"]
    columns: Int[Tensor, " slots"]
    values: Float[Tensor, " slots"]
    width: int
    threshold: Float[Tensor, ""] | None = None

    def __post_init__(self) -> None:
        for name in ("row_ptr", "columns", "values"):
            check_tensor("SparseRows", name, getattr(self, name))
        check_count("SparseRows", "width", self.width)
        if self.threshold is not None:
            check_tensor("SparseRows", "threshold", self.threshold, "a tensor or None")
        _expect("row_ptr", self.row_ptr, torch.int64, self.row_ptr.dim() == 1 and len(self.row_ptr))
        _expect("columns", self.columns, torch.int32, self.columns.dim() == 1)
        if self.values.shape != self.columns.shape:
            raise InvalidInput(
                f"SparseRows: values {list(self.values.shape)} must have the shape of columns, "
                f"{list(self.columns.shape)}"
            )
        if not self.row_ptr.device == self.columns.device == self.values.device:
            raise InvalidInput(
                f"SparseRows: row_ptr is on {self.row_ptr.device}, columns on "
                f"{self.columns.device}, values on {self.values.device}; move them to one device"
            )

    @classmethod
    def from_dense(cls, x: Float[Tensor, "rows width"]) -> "SparseRows":
        """Takes the entries that are not 0 (NaN among them), with as many slots; waits for a GPU.

        Args:
            x: [rows, width]; its gradient comes from the values.

        Returns:
            New memory.

        Raises:
            InvalidInput: x is not [rows, width].
        """
        check_tensor("SparseRows", "x", x, "[rows, width]")
        if x.dim() != 2:
            raise InvalidInput(f"SparseRows: x must be [rows, width], got {list(x.shape)}")
        row, column = (x != 0).nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(x))
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(row_ptr, column.int(), x[row, column], x.shape[1])

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_ptr) - 1

    @property
    def slots(self) -> int:
        """How many entries there is room for."""
        return len(self.columns)

    def count(self) -> Int[Tensor, ""]:
        """How many entries there are, int64 []."""
        return self.row_ptr[-1]

    def row_counts(self) -> Int[Tensor, " rows"]:
        """How many entries each row has, int64."""
        return self.row_ptr.diff()

    def column_counts(self) -> Int[Tensor, " width"]:
        """How many entries each column has, int64."""
        column = self.columns.long() % (self.width + 1)  # -1 becomes a column behind the last
        counts = column.new_zeros(self.width + 1)
        return counts.scatter_add(0, column, torch.ones_like(column))[:-1]

    def row_of(self) -> Int[Tensor, " slots"]:
        """The row of each slot, int64; -1 behind the last entry."""
        slot = torch.arange(self.slots, device=self.columns.device)
        row = torch.searchsorted(self.row_ptr, slot, right=True) - 1
        return torch.where(slot < self.count(), row, -1)

    def dense(self) -> Float[Tensor, "rows width"]:
        """All entries, zeros included; the gradient of the values comes from their places."""
        if not torch.compiler.is_compiling():
            self._check_places()
        return self.spread()

    def spread(self) -> Float[Tensor, "rows width"]:
        """`dense` of entries that an operator gave; nothing is checked, so no device waits."""
        row, size = self.row_of(), self.rows * self.width
        none = (row < 0) | (self.columns < 0)  # the latter where all slots were too few
        place = torch.where(none, size, row * self.width + self.columns)  # one behind the last
        flat = self.values.new_zeros(size + 1).scatter(0, place, self.values)
        return flat[:-1].view(self.rows, self.width)

    def _check_places(self) -> None:
        if self.rows and int(self.row_ptr[-1]) > self.slots:
            raise InvalidInput(
                f"SparseRows: {int(self.row_ptr[-1])} entries, of which {self.slots} have room; "
                "select again with more slots"
            )
        if bool((self.columns >= self.width).any()):
            raise InvalidInput(
                f"SparseRows: column {int(self.columns.max())} is beyond the width {self.width}"
            )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "SparseRows":
        """The same entries on another device, or with values of another dtype."""
        device = self.values.device if device is None else device
        dtype = self.values.dtype if dtype is None else dtype
        threshold = None if self.threshold is None else self.threshold.to(device, dtype)
        return replace(
            self,
            row_ptr=self.row_ptr.to(device),
            columns=self.columns.to(device),
            values=self.values.to(device, dtype),
            threshold=threshold,
        )


def _expect(name: str, value: Tensor, dtype: torch.dtype, shaped: int | bool) -> None:
    if value.dtype != dtype or not shaped:
        kind = str(dtype).removeprefix("torch.")
        size = "rows + 1" if name == "row_ptr" else "slots"
        got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise InvalidInput(f"SparseRows: {name} must be {kind} [{size}], got {got}")
