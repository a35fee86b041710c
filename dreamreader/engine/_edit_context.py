"""The place where an edit works: shapes of the site in this call, and the edit's selection."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._resolved import Selection
from dreamreader.engine._selection import describe, mask_of
from dreamreader.engine._tokens import SiteTokens
from dreamreader.errors import InvalidInput


@dataclass(frozen=True)
class RowSet:
    """The rows of one batch within a run of `total` rows: `start` .. `start + count - 1`.

    `total` is None where the caller runs the subject: then the batch says how many rows there are.
    """

    total: int | None = None
    start: int = 0
    count: int | None = None

    def resolve(self, rows: int) -> "RowSet":
        """With the numbers that a call without a plan leaves open."""
        return self if self.total is not None else RowSet(rows, 0, rows)


@dataclass(eq=False)
class EditContext:
    """Where an edit is applied: what `EditRequest.instructions` and `apply` may ask.

    Attributes:
        site: name of the site.
        width: features at the site. heads: number of heads, None where it has none.
        rows: rows of each branch in this call. total: rows of the run. first: number of row 0 here.
        beams: entries of each row, one after the other: the beams of a search, else 1.
        per_head: the values have a dimension of heads, so that a vector [d_head] is one for each.
        branches: names of the equal chunks of the batch, in order.
        tokens: length of the sequence. hw: grid of image tokens where known.
        instant: step, timestep, sigma, fraction and evaluation; None where time is unknown.
        selection: what the edit holds of the batch.
    """

    site: str
    width: int
    heads: int | None
    rows: int
    total: int
    first: int
    branches: tuple[str, ...]
    sequence: SiteTokens
    instant: StepInfo | None
    device: torch.device
    dtype: torch.dtype
    seeds: tuple[int, ...] | None = None
    beams: int = 1
    per_head: bool = False
    selection: Selection = None  # pyright: ignore[reportAssignmentType]

    @property
    def selected(self) -> Tensor:
        """[batch or 1, tokens or 1], strength of each token under the edit's selection."""
        return self.selection.strength

    @property
    def batch(self) -> int:
        return self.rows * self.beams * len(self.branches)

    @property
    def own(self) -> Tensor | None:
        """[batch, tokens] int64: index of each token among its row's own tokens, -1 at padding.

        None where there is no text with rows of its own: every entry is a token then.
        """
        return self.sequence.own

    def over_batch(self, rows: Tensor) -> Tensor:
        """[rows, ...] values of the rows here as [batch, ...], one for each entry."""
        each = rows if self.beams == 1 else rows.repeat_interleave(self.beams, 0)
        return each.repeat(len(self.branches), *(1,) * (rows.dim() - 1))

    @property
    def tokens(self) -> int:
        return self.sequence.tokens

    @property
    def hw(self) -> tuple[int, int] | None:
        return self.sequence.hw

    def per_row(self, value: Any, name: str) -> Tensor:
        """A per-row argument as a float tensor: [] for one value, else [batch], one for each entry.

        Raises:
            InvalidInput: it has neither 1 value nor one for each row of the run.
        """
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32)
        if tensor.dim() > 1:
            raise InvalidInput(
                f"{name} at {self.site}: one number for each row is expected, got "
                f"{list(tensor.shape)}"
            )
        if tensor.dim() == 0 or tensor.numel() == 1:
            return tensor.reshape(())
        if tensor.numel() != self.total:
            raise InvalidInput(
                f"{name} at {self.site}: has {tensor.numel()} values, the run has {self.total} rows"
            )
        return self.over_batch(tensor[self.first : self.first + self.rows])

    def strength(self, value: Any, name: str) -> Tensor:
        """A per-row strength times the selection: broadcasts to [batch, tokens]."""
        amount = self.per_row(value, name)
        amount = amount.reshape(-1, 1) if amount.dim() else amount
        # where, not a product: an unselected token stays at exactly 0 (and the sign of 0 with it)
        return torch.where(self.selected != 0, self.selected * amount.to(self.selected.device), 0.0)

    def channel_mask(self, heads: Any, channels: Any) -> Tensor | None:
        """bool [width] of the chosen heads and channels; None for all.

        Raises:
            InvalidInput: an index is out of range, or the site has no heads.
        """
        if heads is None and channels is None:
            return None
        mask = torch.ones(self.width, dtype=torch.bool)
        if heads is not None:
            mask &= self._of_heads(heads)
        if channels is not None:
            mask &= mask_of(channels, self.width, f"channels at {self.site}")
        if not mask.any():
            asked = {"heads": heads, "channels": channels}
            said = [f"{name}={describe(one)}" for name, one in asked.items() if one is not None]
            of = f"{self.width} channels" + (f" in {self.heads} heads" if self.heads else "")
            raise InvalidInput(f"{self.site}: {' and '.join(said)} selects none of the {of}")
        return mask

    def vectors(self, value: Tensor, heads: Any, name: str) -> Tensor:
        """A direction or several as [m, width].

        Accepts [width], [m, width], [heads, d_head] where the site has heads, and [d_head] with
        `heads` given, which puts the same vector into each chosen head.

        Raises:
            InvalidInput: another length, or values that are not finite.
        """
        if not value.is_floating_point():
            raise InvalidInput(
                f"{name} at {self.site}: floating point is needed, got {value.dtype}"
            )
        if not bool(value.detach().isfinite().all()):
            raise InvalidInput(f"{name} at {self.site}: has values that are not finite")
        if value.shape[-1] == self.width and value.dim() <= 2:
            return value.reshape(-1, self.width)
        if self.heads:
            size = self.width // self.heads
            if value.shape == (self.heads, size):
                return value.reshape(1, self.width)
            given = heads is not None or self.per_head
            if given and value.shape[-1] == size and value.dim() <= 2:
                chosen = self._of_heads(slice(None) if heads is None else heads)
                chosen = chosen.reshape(self.heads, size)
                wide = value.reshape(-1, 1, size) * chosen.to(value)  # [m, heads, d_head]
                return wide.reshape(-1, self.width)
        split = f" ({self.heads} heads of {self.width // self.heads})" if self.heads else ""
        raise InvalidInput(
            f"{name} at {self.site}: the site has {self.width} features{split}, {name} is "
            f"{list(value.shape)}"
        )

    def step_of(self, count: int, name: str) -> int:
        """The entry for the running step in a table with one row for each step.

        Raises:
            InvalidInput: the step is unknown or beyond the table.
        """
        if self.instant is None or self.instant.step >= count:
            at = "unknown" if self.instant is None else str(self.instant.step)
            raise InvalidInput(
                f"{name} at {self.site}: holds {count} steps, the running step is {at}"
            )
        return self.instant.step

    def _of_heads(self, heads: Any) -> Tensor:
        if not self.heads:
            raise InvalidInput(
                f"{self.site} has no heads; heads={describe(heads)} needs the port q, k, v or heads"
            )
        chosen = mask_of(heads, self.heads, f"heads at {self.site}")
        return chosen.repeat_interleave(self.width // self.heads)
