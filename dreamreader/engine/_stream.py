"""Readers of activations, and what they are handed at each call: the model's own memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._pattern import parse
from dreamreader.engine._request import Request
from dreamreader.engine._resolved import Selection
from dreamreader.engine._session_state import SessionState
from dreamreader.engine._sites import Site
from dreamreader.errors import ClockUnknown, InvalidInput


@dataclass(frozen=True, eq=False)
class Stream(Request):
    """A reader of activations while the model runs; the engine keeps and copies nothing of them.

    Args:
        site: sites with any port but `probs`.
        callback: called as `callback(view)` wherever the selection holds, after the edits. It has
            to copy what it wants before it returns: the values are the model's own memory.

    Raises:
        InvalidInput: `callback` is no function, or a site has the port `probs`.

    Example:
        >>> norms = []
        >>> Stream("unet.mid_block", lambda flowing: norms.append(flowing.x.norm()), branch="cond")
        Stream(unet.mid_block, branch='cond')
    """

    callback: Callable[["ActivationView"], None]

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.callback):
            raise InvalidInput(
                f"Stream: callback must be a function, got {type(self.callback).__name__}"
            )
        for site in self.sites:
            if parse(site).port == "probs":
                raise InvalidInput(
                    f"Stream: {site} are attention probabilities, which no model holds in memory; "
                    "use Watch or Record for them"
                )

    def __repr__(self) -> str:
        return self.describe()


class ActivationView:
    """Activations of one call of a site, handed on while the model runs.

    Attributes:
        key: the selection, to cache by: one object for all calls with the same selection and the
            same shape, type and device of `x`.
        x: [batch, tokens, features], heads side by side; the model's own memory, through strides
            (copied only where a port's heads interleave with others in it). Valid during the call.
            It holds the whole batch: `entries` and `tokens` say what is kept of it.
        minus: to be taken off x at a `delta` port, whose x is the module's result and minus its
            input; None elsewhere, and where edits made the difference x itself.
        instant: step, timestep, sigma, fraction and evaluation; None for what runs outside
            denoising and decoding, such as a text encoder.
        run: equal for the calls of one run of the subject within the session, and for no others.
    """

    __slots__ = ("key", "x", "minus", "instant", "run", "_now", "_streamer")

    def __init__(
        self,
        key: Selection,
        x: Float[Tensor, "batch tokens features"],
        minus: Float[Tensor, "batch tokens features"] | None,
        instant: StepInfo | None,
        now: CallContext,
        streamer: "Streamer",
    ):
        self.key = key
        self.x = x
        self.minus = minus
        self.instant = instant
        self.run = now.run
        self._now = now
        self._streamer = streamer

    @property
    def site(self) -> Site:
        return self.key.site

    @property
    def branches(self) -> tuple[str, ...]:
        return self.key.branches

    @property
    def rows(self) -> tuple[int, ...]:
        return self.key.rows

    @property
    def entries(self) -> list[int]:
        return self.key.entries

    @property
    def index(self) -> Int32[Tensor, " entries"]:
        return self.key.index

    @property
    def tokens(self) -> Int32[Tensor, " kept"]:
        return self.key.tokens

    @property
    def offsets(self) -> Int32[Tensor, " entries+1"]:
        return self.key.offsets

    @property
    def hw(self) -> tuple[int, int] | None:
        return self.key.hw

    @property
    def starts(self) -> tuple[int, ...]:
        return self.key.starts

    @property
    def shift(self) -> Int32[Tensor, " entries"]:
        """What makes a token number the row's own position in a language model; 0 elsewhere.

        position = token + shift; padding is no token of the row and is never kept.
        """
        return self.key.shift(self._now.tokens)

    @property
    def moments(self) -> int | None:
        """How many (step, evaluation) of this run the selection keeps, by the schedule.

        1 outside denoising; None in a language model, which does not say how far it will decode.
        """
        known = self._streamer.moments(self._now)
        return None if known is None else len(known)

    @property
    def moment(self) -> int | None:
        """Which of `moments` this is, from 0; None where the schedule does not say."""
        known = self._streamer.moments(self._now)
        if known is None:
            return None
        at = self.instant
        return 0 if at is None else known.get((at.step, at.evaluation))


class Streamer:
    """A `Stream` at one site in a session, with the number of its request."""

    def __init__(self, request: Stream, number: int, site: Site, shared: SessionState):
        self.request = request
        self.number = number
        self.site = site
        self._shared = shared
        self._known: dict[tuple, Selection] = {}
        self._last: tuple[int, int, int] = (-1, 0, 0)
        self._had: tuple[str, ...] = ()
        self._schedule: list[StepInfo] | None = None
        self._moments: dict[tuple[int, int], int] = {}

    def select(self, found: Selection, x: Tensor) -> Selection | None:
        """The selection that stands for all calls of its kind; None where it holds nothing.

        Raises:
            ClockUnknown: which tokens of a language model these are is unknown.
            InvalidInput: the attention mask leaves out tokens between those of a row.
        """
        if not found.entries:
            return None
        found.require_positions()
        if not len(found.tokens):
            return None
        numbers = found.tokens.numpy().tobytes(), found.offsets.numpy().tobytes()
        kind = (found.branches, found.rows, *numbers, found.hw, found.starts, found.map)
        return self._known.setdefault((*kind, x.shape, x.dtype, x.device), found)

    def hand_on(self, x: Tensor, minus: Tensor | None, kept: Selection, now: CallContext) -> None:
        """Call the function of the stream.

        Raises:
            ClockUnknown: step or branch of a denoiser, or the position of a language model, is
                unknown.
            InvalidInput: the same rows come twice, or a CUDA graph is being captured.
        """
        instant = self._instant(now)
        self._check_once(now, instant, kept)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InvalidInput(
                f"{self.site.name}: cannot be streamed while a CUDA graph is captured: a replayed "
                "graph runs no hooks; run the model without CUDA graphs"
            )
        if x.requires_grad:
            x = x.detach()
        if minus is not None and minus.requires_grad:
            minus = minus.detach()
        self.request.callback(ActivationView(kept, x, minus, instant, now, self))

    def _instant(self, now: CallContext) -> StepInfo | None:
        instant = now.instant
        if not isinstance(instant, StepInfo):
            if now.phase in ("denoise", "language"):
                raise ClockUnknown(f"{self.site.name}: streaming needs the step. {instant}")
            return None
        if not isinstance(now.branches, tuple):
            raise ClockUnknown(f"{self.site.name}: streaming needs the branch. {now.branches}")
        return instant

    def _check_once(self, now: CallContext, instant: StepInfo | None, kept: Selection) -> None:
        """Refuse a second call with the same rows: nothing tells the two apart."""
        step, evaluation = (0, 0) if instant is None else (instant.step, instant.evaluation)
        moment = (now.run, step, evaluation)
        if moment > self._last:
            self._last, self._had = moment, kept.branches
            return
        if set(self._had) & set(kept.branches):
            when = "the same moment" if instant is None else f"step {step}"
            raise InvalidInput(
                f"{self.site.name} ran more than once at {when} with the same rows (a shared "
                "module, VAE tiling or slicing): stream a site that runs once"
            )
        self._had += kept.branches

    def moments(self, now: CallContext) -> dict[tuple[int, int], int] | None:
        """Number of each (step, evaluation) that the selection keeps; None if unknown."""
        if now.phase == "language":
            return None
        if now.phase != "denoise":
            return {(0, 0): 0}
        tracker = self._shared.tracker
        schedule = tracker.entries()
        if schedule is not self._schedule:
            total = tracker.total()
            kept = [each for each in schedule if self.request.runs_at(each, total)]
            self._moments = {(each.step, each.evaluation): n for n, each in enumerate(kept)}
            self._schedule = schedule
        return self._moments
