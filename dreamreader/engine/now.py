"""What is known while a module runs: time, branches, batch, places of tokens."""

from dataclasses import dataclass, field

from torch import Tensor

from dreamreader.engine.clock_schedule import Instant
from dreamreader.engine.families.places import Layout
from dreamreader.errors import ClockUnknown

ALL = ("all",)  # the branches of what runs outside guidance, such as a decoder of pictures


@dataclass(frozen=True)
class Positions:
    """Token positions of one call of a language model.

    Args:
        past: tokens that the cache already holds.
        length: tokens of this call.
        prompt: tokens of the padded prompt.
        pads: padding tokens on the left of each row.
        padded_inside: whether tokens are masked elsewhere, as padding on the right is.
    """

    past: int
    length: int
    prompt: int
    pads: tuple[int, ...]
    padded_inside: bool = False

    @property
    def padding(self) -> tuple:
        """Everything that decides which tokens of the call are padding."""
        behind = self.past >= max(self.pads, default=0)
        key = self.length, self.padded_inside
        return key if behind else (*key, self.past, self.pads)


@dataclass(slots=True, eq=False)
class Now:
    """One call of a denoiser, text encoder, language model, or of anything outside them.

    Args:
        component: its name, empty outside.
        phase: `denoise`, `text`, `language` or `outside`.
        run: number of the run within the session.
        instant: time, or why it is unknown.
        branches: names of the equal chunks of the batch, or why they are unknown.
        batch: entries of the batch, None where nothing says it.
    """

    component: str
    phase: str
    run: int
    instant: Instant | ClockUnknown
    branches: tuple[str, ...] | ClockUnknown
    batch: int | None
    layout: Layout | None = None
    positions: Positions | None = None
    ids: Tensor | None = None
    stamp: tuple = field(init=False)

    def __post_init__(self):
        time = (
            (self.instant.step, self.instant.evaluation)
            if isinstance(self.instant, Instant)
            else None
        )
        known = self.branches if isinstance(self.branches, tuple) else None
        self.stamp = (self.component, time, known, self.batch, self.layout, self.positions)

    @property
    def shape_key(self) -> tuple:
        """Everything that decides a program except the time."""
        return (self.component, self.stamp[2], self.batch, self.layout, self.positions)

    @property
    def placeless_key(self) -> tuple:
        """Everything that decides a program which selects no tokens, except the time."""
        padding = None if self.positions is None else self.positions.padding
        return (self.component, self.stamp[2], self.batch, self.layout, padding)

    @property
    def names(self) -> tuple[str, ...]:
        """The branches, or one nameless chunk where they are unknown."""
        return self.branches if isinstance(self.branches, tuple) else ("unknown",)
