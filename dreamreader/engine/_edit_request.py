"""What every edit is: a request that knows its change."""

from dataclasses import dataclass

from torch import Tensor

from dreamreader.engine._edit_context import EditContext
from dreamreader.engine._request import Request
from dreamreader.ops import Instruction


@dataclass(frozen=True, eq=False)
class EditRequest(Request):
    """An edit: knows its change as instructions for the kernel, or as a function of the tensor.

    Subclasses give `instructions` or set `is_function` and give `apply`.
    """

    is_function = False

    @property
    def changes_with_step(self) -> bool:
        """Whether the instructions themselves, not only the selection, differ from step to step."""
        return False

    @property
    def is_same_everywhere(self) -> bool:
        """Whether all sites of one shape get the same instructions."""
        return False

    @property
    def keeps_norm(self) -> bool:
        """Whether it restores the norm that a row had before this edit."""
        return False

    @property
    def selects(self) -> bool:
        """Whether `apply` itself leaves what is not selected, bit for bit."""
        return False

    def touched(self, place: EditContext) -> Tensor:
        """Where a function acts: not 0 in a tensor that broadcasts to [batch, tokens]."""
        return place.selected

    def row_lengths(self) -> dict[str, int]:
        """Length of every per-row argument."""
        return {}

    def check(self, place: EditContext) -> None:
        """Refuse inputs that do not fit the site; called once per site, before the first change."""

    def instructions(self, place: EditContext) -> list[Instruction]:
        raise NotImplementedError

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        raise NotImplementedError
