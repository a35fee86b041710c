"""Steering: add a direction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dreamreader.edits.base import ChannelEdit, check_finite, per_site, row_length
from dreamreader.engine.place import Place
from dreamreader.errors import InvalidInput
from dreamreader.ops import Instruction


@dataclass(frozen=True, eq=False)
class Steer(ChannelEdit):
    """Adds a direction to every selected token: x + alpha v.

    Args:
        site: site string or several.
        direction: [features], [heads, d_head] at ports with heads, [d_head] with `heads` given;
            [steps, features] for one direction for each step; or a mapping from site names to
            these.
            Used as given: it is not normalised.
        alpha: one number, or one for each row of the run; negative values steer away.
        norm_match: rescale each token to the norm that it had before this edit.

    Raises:
        InvalidInput: values that are not finite, or at the run a length that does not fit the site.

    Example:
        >>> Steer("unet.mid_block.attentions.0", torch.ones(4), alpha=[0.0, 2.0]).row_lengths()
        {'alpha': 2}
    """

    direction: Tensor | Mapping[str, Tensor]
    alpha: float | Sequence[float] | Tensor = 1.0
    norm_match: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        given = self.direction if isinstance(self.direction, Mapping) else {"": self.direction}
        for name, value in given.items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise InvalidInput(
                    f"Steer: direction must be a tensor or a mapping to tensors, got {kind}"
                )
            check_finite(f"Steer: direction {name}".rstrip(), value)
        check_finite("Steer: alpha", self.alpha)

    @property
    def keeps_norm(self) -> bool:
        return self.norm_match

    @property
    def changes_with_step(self) -> bool:
        values = (
            self.direction.values() if isinstance(self.direction, Mapping) else [self.direction]
        )
        return any(value.dim() >= 2 for value in values)

    def row_lengths(self) -> dict[str, int]:
        return row_length("alpha", self.alpha)

    def instructions(self, place: Place) -> list[Instruction]:
        value = per_site(self.direction, place.site, "Steer: direction")
        vector = place.vectors(self._at_step(value, place), self.heads, "direction")
        strength = place.strength(self.alpha, "alpha")
        channels = place.channel_mask(self.heads, self.channels)
        found = [Instruction("steer", strength, vectors=vector, channels=channels)]
        if self.norm_match:
            touched = (strength.detach() != 0).float()
            found.append(Instruction("renorm", touched, channels=channels))
        return found

    def _at_step(self, value: Tensor, place: Place) -> Tensor:
        """The direction of the running step, where there is one for each."""
        split = place.heads is not None and value.shape == (place.heads, place.width // place.heads)
        if value.dim() < 2 or split:
            return value
        return value[place.step_of(value.shape[0], "direction")]


def unit(direction: Tensor) -> Tensor:
    """The direction at length 1, in float32 or wider."""
    wide = direction.to(torch.promote_types(direction.dtype, torch.float32))
    return wide / torch.linalg.vector_norm(wide)
