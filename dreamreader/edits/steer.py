"""Steering: add a direction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dreamreader.edits.base import ChannelEdit, check_finite, per_site, row_length
from dreamreader.engine import EditContext
from dreamreader.errors import InvalidInput
from dreamreader.ops import Instruction


@dataclass(frozen=True, eq=False)
class Steer(ChannelEdit):
    """Adds a direction to every selected token: x + alpha v.

    With a gate g of length 1: x + alpha max(<x, g>, 0) v.

    Args:
        site: site string or several.
        direction: [features], [heads, d_head] at ports with heads, [d_head] with `heads` given;
            [steps, features] for one direction for each step; or a mapping from site names to
            these.
            Used as given: it is not normalised.
        alpha: one number, or one for each row of the run; negative values steer away.
        norm_match: rescale each token to the norm that it had before this edit.
        gate: [features], or a mapping from site names, scaled to length 1: a token gets as much of
            the direction as it has of the gate, and nothing where it points away from it.

    Raises:
        InvalidInput: values that are not finite, or at the run a length that does not fit the site.

    Example:
        >>> Steer("unet.mid_block.attentions.0", torch.ones(4), alpha=[0.0, 2.0]).row_lengths()
        {'alpha': 2}
    """

    direction: Tensor | Mapping[str, Tensor]
    alpha: float | Sequence[float] | Tensor = 1.0
    norm_match: bool = field(default=False, kw_only=True)
    gate: Tensor | Mapping[str, Tensor] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _check_vectors("direction", self.direction)
        if self.gate is not None:
            _check_vectors("gate", self.gate)
        check_finite("Steer: alpha", self.alpha)

    @property
    def is_function(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.gate is not None

    @property
    def keeps_norm(self) -> bool:
        return self.norm_match

    @property
    def changes_with_step(self) -> bool:
        return any(
            value.dim() >= 2
            for given in (self.direction, self.gate)
            if given is not None
            for value in (given.values() if isinstance(given, Mapping) else [given])
        )

    @property
    def is_same_everywhere(self) -> bool:
        return type(self) is Steer and isinstance(self.direction, Tensor) and self.gate is None

    def row_lengths(self) -> dict[str, int]:
        return row_length("alpha", self.alpha)

    def instructions(self, place: EditContext) -> list[Instruction]:
        vector = self._vector("direction", place)
        strength = place.strength(self.alpha, "alpha")
        channels = place.channel_mask(self.heads, self.channels)
        found = [Instruction("steer", strength, vectors=vector, channels=channels)]
        if self.norm_match:
            touched = (strength.detach() != 0).float()
            found.append(Instruction("renorm", touched, channels=channels))
        return found

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        """x with the direction added as far as each token points along the gate."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # [batch, tokens, width]
        vector, gate = (
            self._vector(name, place).to(wide.device, wide.dtype) for name in ("direction", "gate")
        )
        channels = place.channel_mask(self.heads, self.channels)
        mask = torch.ones_like(gate) if channels is None else channels.to(gate)
        if not bool((gate * mask != 0).any()):
            raise InvalidInput(f"Steer: gate at {place.site} is zero, it opens nowhere")
        share = (wide @ unit(gate * mask).T).clamp(min=0)  # [batch, tokens, 1]
        alpha = place.per_row(self.alpha, "alpha").to(wide).reshape(-1, 1, 1)
        y = wide + alpha * share * vector * mask
        if self.norm_match:
            before, after = (
                torch.linalg.vector_norm(each * mask, dim=2, keepdim=True) for each in (wide, y)
            )
            factor = torch.where(after > 0, before / after, 1.0)
            y = torch.where(mask != 0, y * factor, y)
        still = share == 0
        if not alpha.requires_grad:  # else the derivative at 0 is wanted
            still = still | (alpha == 0)
        return torch.where(still, x, y.to(x.dtype))

    def _vector(self, name: str, place: EditContext) -> Tensor:
        """[m, width]: the direction or gate at a site and the running step."""
        value = per_site(getattr(self, name), place.site, f"Steer: {name}")
        return place.vectors(self._at_step(value, place, name), self.heads, name)

    def _at_step(self, value: Tensor, place: EditContext, name: str) -> Tensor:
        """The vector of the running step, where there is one for each."""
        split = place.heads is not None and value.shape == (place.heads, place.width // place.heads)
        if value.dim() < 2 or split:
            return value
        return value[place.step_of(value.shape[0], name)]


def unit(direction: Tensor) -> Tensor:
    """The direction at length 1, in float32 or wider."""
    wide = direction.to(torch.promote_types(direction.dtype, torch.float32))
    return wide / torch.linalg.vector_norm(wide)


def _check_vectors(name: str, given: object) -> None:
    """Refuse a direction or gate that is no tensor, or has values that are not finite."""
    values = given if isinstance(given, Mapping) else {"": given}
    for site, value in values.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise InvalidInput(
                f"Steer: {name} must be a tensor or a mapping to tensors, got {kind}"
            )
        check_finite(f"Steer: {name} {site}".rstrip(), value)
