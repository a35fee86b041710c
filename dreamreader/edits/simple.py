"""Scale and Clamp: multiply or bound values, or a component along a direction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dreamreader.edits.base import ChannelEdit, check_finite, per_site, row_length
from dreamreader.edits.steer import unit
from dreamreader.engine import EditContext
from dreamreader.errors import InvalidInput
from dreamreader.ops import Instruction

Rows = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class Scale(ChannelEdit):
    """Multiplies the selected values: factor x.

    Args:
        factor: one number, or one for each row; 1 changes nothing, 0 gives zeros (of either sign:
            `Ablate` writes zeros without reading the value).

    Example:
        >>> Scale("transformer.transformer_blocks.0.attn:heads", 2.0, heads=[3]).heads
        [3]
    """

    factor: Rows = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_finite("Scale: factor", self.factor)
        check_constant("Scale: factor", self.factor)

    @property
    def is_same_everywhere(self) -> bool:
        return type(self) is Scale

    def row_lengths(self) -> dict[str, int]:
        return row_length("factor", self.factor)

    def instructions(self, place: EditContext) -> list[Instruction]:
        factor = place.per_row(self.factor, "factor")
        # A factor of 1 is no change at all, bit for bit: such rows get strength 0.
        share = (factor.detach() != 1).float()
        strength = place.strength(1.0, "factor") * (share.reshape(-1, 1) if share.dim() else share)
        channels = place.channel_mask(self.heads, self.channels)
        return [Instruction("scale", strength, lo=factor, channels=channels)]


@dataclass(frozen=True, eq=False)
class Clamp(ChannelEdit):
    """Bounds values to [lo, hi], or with a direction v the component <x, v> of each token.

    Formula: clamp(x, lo, hi); with a direction x + (clamp(c, lo, hi) - c) v with c = <x, v>, |v| =
        1.

    Args:
        lo, hi: bounds, one number or one for each row; None leaves that side open.
        direction: [features], scaled to length 1, or a mapping from site names.
        strength: share of the change, one number or one for each row.

    Raises:
        InvalidInput: no bound is given, or a bound is NaN.
    """

    lo: Rows | None = None
    hi: Rows | None = None
    direction: Tensor | Mapping[str, Tensor] | None = field(default=None, kw_only=True)
    strength: Rows = field(default=1.0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.lo is None and self.hi is None:
            raise InvalidInput("Clamp: needs lo, hi or both")
        for name in ("lo", "hi", "strength"):
            if getattr(self, name) is not None:
                check_finite(f"Clamp: {name}", getattr(self, name))
        check_constant("Clamp: lo", self.lo)
        check_constant("Clamp: hi", self.hi)
        if isinstance(self.direction, Tensor):
            check_direction("Clamp", self.direction)

    @property
    def is_same_everywhere(self) -> bool:
        return type(self) is Clamp and not isinstance(self.direction, Mapping)

    def row_lengths(self) -> dict[str, int]:
        names = ("lo", "hi", "strength")
        return {k: v for name in names for k, v in row_length(name, getattr(self, name)).items()}

    def instructions(self, place: EditContext) -> list[Instruction]:
        strength = place.strength(self.strength, "strength")
        channels = place.channel_mask(self.heads, self.channels)
        lo = None if self.lo is None else place.per_row(self.lo, "lo")
        hi = None if self.hi is None else place.per_row(self.hi, "hi")
        if self.direction is None:
            return [Instruction("clamp", strength, lo=lo, hi=hi, channels=channels)]
        vector = place.vectors(
            per_site(self.direction, place.site, "Clamp: direction"), self.heads, "direction"
        )
        if channels is not None:
            vector = vector * channels.to(vector.device)
        return [
            Instruction(
                "clamp_component", strength, vectors=unit(vector), lo=lo, hi=hi, channels=channels
            )
        ]


def check_constant(name: str, value: Rows | None) -> None:
    """Refuse a number that is to be learned: bounds and factors get no gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise InvalidInput(
            f"{name} requires grad and gets no gradient; detach it, or learn the strength or the "
            "direction of another edit"
        )


def check_direction(label: str, direction: Tensor) -> None:
    """Refuse a direction that is not finite or has no length."""
    check_finite(f"{label}: direction", direction)
    if not bool((direction != 0).any()):
        raise InvalidInput(f"{label}: direction is zero, it points nowhere")
