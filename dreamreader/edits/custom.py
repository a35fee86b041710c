"""Edit: any change, as a plain function of the tensor."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dreamreader.engine import EditContext, EditRequest, apply_function


@dataclass(frozen=True, eq=False)
class Edit(EditRequest):
    """Applies a function to the selected rows: fn(x) or fn(x, place).

    Args:
        fn: gets a copy of the selected rows [rows, tokens, features], branch after branch (at ports
            with heads [rows, tokens, heads, d_head]), and gives the new values in the same shape,
            or None to leave them. `place` has site, branches, step (`place.instant`) and grid.

    Raises:
        InvalidInput: at the run, where fn gives another shape or dtype.

    Example:
        >>> Edit("unet.mid_block", lambda x: x.flip(1)).describe()
        'Edit(unet.mid_block)'
    """

    fn: Callable[..., Tensor | None]

    is_function = True

    @property
    def changes_with_step(self) -> bool:
        return True  # the function is told the step

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        return apply_function(self.fn, x, place, "Edit")
