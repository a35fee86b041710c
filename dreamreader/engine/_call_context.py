"""What is known while a module runs: time, branches, batch, places of tokens."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._families.places import StreamLayout
from dreamreader.engine._token_layout import TokenLayout
from dreamreader.errors import ClockUnknown

ALL = ("all",)  # the branches of what runs outside guidance, such as a decoder of pictures


@dataclass(slots=True, eq=False)
class CallContext:
    """One call of a denoiser, text encoder, language model, or of anything outside them.

    Args:
        component: its name, empty outside.
        phase: `denoise`, `text`, `language` or `outside`; `aside` for what is called within the
            run, as by a callback, but is not the run.
        run: number of the run within the session.
        instant: time, or why it is unknown.
        branches: names of the equal chunks of the batch, or why they are unknown.
        batch: entries of the batch, None where nothing says it.
        layout: places of image and text tokens in a denoiser.
        tokens: which entries are which row's own tokens in a language model, or why that is
            unknown; None elsewhere, where every entry is a token.
        encoder_states: what the encoder gave to the running decoder.
        turning: models in which some layer has its tokens first, and others; see `axes_of`.
    """

    component: str
    phase: str
    run: int
    instant: StepInfo | ClockUnknown
    branches: tuple[str, ...] | ClockUnknown
    batch: int | None
    layout: StreamLayout | None = None
    tokens: TokenLayout | ClockUnknown | None = None
    encoder_states: Tensor | None = None
    turning: dict[nn.Module, bool] = field(default_factory=dict)
    stamp: tuple = field(init=False)

    def __post_init__(self):
        time = (
            (self.instant.step, self.instant.evaluation)
            if isinstance(self.instant, StepInfo)
            else None
        )
        known = self.branches if isinstance(self.branches, tuple) else None
        tokens = self.tokens.key if isinstance(self.tokens, TokenLayout) else None
        self.stamp = (
            (self.component, self.phase),
            time,
            known,
            self.batch,
            self.layout,
            tokens,
        )

    @property
    def shape_key(self) -> tuple:
        """Everything that decides a program except the time."""
        return (self.stamp[0], self.stamp[2], self.batch, self.layout, self.stamp[5])

    @property
    def placeless_key(self) -> tuple:
        """Everything that decides a program which selects no tokens, except the time."""
        padding = self.tokens.placeless_key if isinstance(self.tokens, TokenLayout) else None
        return (self.stamp[0], self.stamp[2], self.batch, self.layout, padding)

    @property
    def names(self) -> tuple[str, ...]:
        """The branches, or one nameless chunk where they are unknown."""
        return self.branches if isinstance(self.branches, tuple) else ("unknown",)
