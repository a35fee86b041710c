"""LoReFT: a learned low-rank edit, and the variants that fold into the same formula."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.edits.base import check_finite, per_site, row_length
from dreamreader.engine import EditContext, EditRequest
from dreamreader.errors import InvalidInput
from dreamreader.ops.low_rank import low_rank

Table = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class LoReFT(EditRequest):
    """Adds a learned low-rank function of every selected token to it: x + alpha U'(A x + b).

    LoReFT is A = W - R, U = R with orthonormal rows of R. `dreamreader.reft` trains the tables and
    makes the edits.

    Args:
        site: site string or several.
        down: A, [rank, features]; [steps, rank, features] for one adapter for each step of the
            scheduler; with `adapter` another axis comes first: [adapters, rank, features] or
            [adapters, steps, rank, features]; or a mapping from site names to these.
        bias: b, as `down` without features.
        up: U, as `down`. An adapter of a smaller rank is filled with zero rows.
        alpha: strength, one number or one for each row of the run; 0 changes nothing.
        variant: its name, for reading; but for "diagonal" the formula is x + alpha (a x + c), with
            a in `down` and c in `up`, both of rank 1, and `bias` has no part.
        adapter: number of an adapter, or one for each row: a sweep over adapters is one batch.

    Raises:
        InvalidInput: shapes that do not fit each other or values that are not finite; at the run
            another width, an adapter that is not there, or a step beyond the table.
        UnknownName: at the run, a mapping without the site.

    Example:
        >>> first = torch.tensor([[1.0, 0.0]])
        >>> LoReFT("unet.mid_block", -first, torch.zeros(1), first, [0.0, 1.0]).row_lengths()
        {'alpha': 2}

    Reference:
        Wu et al., ReFT: Representation Finetuning for Language Models (2404.03592), equation 2.
    """

    down: Table
    bias: Table
    up: Table
    alpha: float | Sequence[float] | Tensor = 1.0
    variant: str = field(default="loreft", kw_only=True)
    adapter: int | Sequence[int] | None = field(default=None, kw_only=True)

    is_function = True

    def __post_init__(self):
        super().__post_init__()
        check_finite("LoReFT: alpha", self.alpha)
        if self.adapter is not None:
            _check_numbers(self.adapter)
        named = isinstance(self.down, Mapping)
        if any(isinstance(each, Mapping) != named for each in (self.bias, self.up)):
            raise InvalidInput("LoReFT: down, bias and up must be tensors, or mappings all three")
        for site in self.down if isinstance(self.down, Mapping) else [self.sites[0]]:
            down, bias, up = self._tables(site)
            self._check_tables(f"LoReFT {site}", down, bias, up)
        # What the tables are on the device of a site; kept for the life of the edit.
        object.__setattr__(self, "_moved", {})

    @property
    def selects(self) -> bool:
        return True

    @property
    def changes_with_step(self) -> bool:
        tables = self.down.values() if isinstance(self.down, Mapping) else [self.down]
        return any(each.dim() > self._stacked for each in tables)

    def row_lengths(self) -> dict[str, int]:
        return row_length("alpha", self.alpha) | row_length("adapter", self.adapter)

    def touched(self, place: EditContext) -> Tensor:
        if isinstance(self.alpha, Tensor) and self.alpha.requires_grad:
            return place.selected  # the derivative at 0 is wanted
        return place.strength(self.alpha, "alpha")

    def check(self, place: EditContext) -> None:
        down = self._tables(place.site)[0]
        if down.shape[-1] != place.width:
            raise InvalidInput(
                f"LoReFT at {place.site}: made for {down.shape[-1]} features, the site has "
                f"{place.width}"
            )

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        tables = self._on(x, place.site)
        index = self._index(place, tables[0])
        down, up = (each.reshape(-1, *each.shape[-2:]) for each in (tables[0], tables[2]))
        strength = place.strength(self.alpha, "alpha").to(x.device, down.dtype)
        if self.variant == "diagonal":
            return _diagonal(x, down[index], up[index], strength)
        bias = tables[1].reshape(-1, tables[1].shape[-1])
        return low_rank(x, down, bias, up, strength, index)

    @property
    def _stacked(self) -> int:
        """Dimensions of a table without steps."""
        return 2 if self.adapter is None else 3

    def _tables(self, site: str) -> tuple[Tensor, Tensor, Tensor]:
        return (
            per_site(self.down, site, "LoReFT: down"),
            per_site(self.bias, site, "LoReFT: bias"),
            per_site(self.up, site, "LoReFT: up"),
        )

    def _check_tables(self, name: str, down: Tensor, bias: Tensor, up: Tensor) -> None:
        for label, table in (("down", down), ("bias", bias), ("up", up)):
            if not isinstance(table, Tensor) or not table.is_floating_point():
                raise InvalidInput(f"{name}: {label} must be a floating point tensor")
            check_finite(f"{name}: {label}", table)
        if down.shape != up.shape or bias.shape != down.shape[:-1]:
            shapes = ", ".join(str(list(each.shape)) for each in (down, bias, up))
            raise InvalidInput(
                f"{name}: down and up [..., rank, features], bias [..., rank]: got {shapes}"
            )
        if down.dim() not in (self._stacked, self._stacked + 1):
            axes = "[rank, features]" if self.adapter is None else "[adapters, rank, features]"
            raise InvalidInput(
                f"{name}: down must be {axes}, with steps before rank or without, got "
                f"{list(down.shape)}"
            )
        if down.shape[-2] > down.shape[-1]:
            raise InvalidInput(f"{name}: rank {down.shape[-2]} is above the width {down.shape[-1]}")

    def _index(self, place: EditContext, down: Tensor) -> Tensor:
        """int64 [batch]: which of the flattened tables belongs to each batch entry."""
        index = torch.zeros((), dtype=torch.int64)
        if self.adapter is not None:
            index = place.per_row(self.adapter, "adapter").long()
            wrong = index[(index < 0) | (index >= len(down))]
            if len(wrong):
                raise InvalidInput(
                    f"LoReFT at {place.site}: adapter {int(wrong[0])} was asked for, there are "
                    f"{len(down)}"
                )
        if down.dim() > self._stacked:
            steps = down.shape[-3]
            index = index * steps + place.step_of(steps, "LoReFT")
        return index.expand(place.batch).to(down.device)

    def _on(self, x: Tensor, site: str) -> tuple[Tensor, Tensor, Tensor]:
        """The tables on the device of x, float32 (float64 for float64)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        key = site, x.device, wide
        moved: dict = self._moved  # pyright: ignore[reportAttributeAccessIssue]
        if key in moved:
            return moved[key]
        down, bias, up = self._tables(site)
        found = down.to(x.device, wide), bias.to(x.device, wide), up.to(x.device, wide)
        if not any(each.requires_grad for each in (down, bias, up)):  # found may have no graph
            moved[key] = found
        return found


def _diagonal(
    x: Float[Tensor, "batch tokens width"],
    scale: Float[Tensor, "batch 1 width"],
    shift: Float[Tensor, "batch 1 width"],
    strength: Float[Tensor, "..."],
) -> Float[Tensor, "batch tokens width"]:
    """x + s (a x + c); what has strength 0 stays bit for bit."""
    share = strength.unsqueeze(-1)
    wide = x.to(scale.dtype)
    y = (wide + share * (scale * wide + shift)).to(x.dtype)
    return y if strength.requires_grad else torch.where(share == 0, x, y)


def _check_numbers(adapter: object) -> None:
    listed = [adapter] if isinstance(adapter, int) else adapter
    if not isinstance(listed, list | tuple) or not all(
        isinstance(each, int) and not isinstance(each, bool) for each in listed
    ):
        raise InvalidInput(f"LoReFT: adapter must be a number or one for each row, got {adapter!r}")
