"""Gradients at sites: of whatever the caller differentiates."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine._edit_context import EditContext
from dreamreader.engine._edit_request import EditRequest
from dreamreader.errors import InvalidInput


@dataclass(eq=False)
class SiteGradient:
    """Values of one call of a site, and what was differentiated with respect to them.

    Attributes:
        value: detached, in the model's own memory where that can be.
        gradient: None until a backward pass reaches the site; several add up.
    """

    value: Float[Tensor, "batch tokens features"]
    gradient: Float[Tensor, "batch tokens features"] | None = None

    def add(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


@dataclass(frozen=True, eq=False)
class Leaf(EditRequest):
    """Leaves every value as it is, and keeps the gradient that comes back through it."""

    found: dict[str, list[SiteGradient]] = field(default_factory=dict, kw_only=True)

    is_function = True

    @property
    def selects(self) -> bool:
        return True

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        if not torch.is_grad_enabled():
            raise InvalidInput(
                f"{place.site}: its gradient is asked for, but gradients are off here: call the "
                "model itself, without torch.no_grad()"
            )
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        kept = SiteGradient(x.detach())
        x.register_hook(kept.add)
        self.found.setdefault(place.site, []).append(kept)
        return x
