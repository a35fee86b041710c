"""Readers of activations, and what they are handed at each call: the model's own memory."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from dreamreader.engine.clock_schedule import Instant
from dreamreader.engine.now import Now
from dreamreader.engine.pattern import parse
from dreamreader.engine.place import Entries, Place, kept_entries
from dreamreader.engine.request import Request
from dreamreader.engine.shared import Shared
from dreamreader.engine.sites import Site
from dreamreader.engine.token_layout import TokenLayout, TokenMap
from dreamreader.errors import ClockUnknown, InvalidInput


@dataclass(frozen=True, eq=False)
class Stream(Request):
    """A reader of activations while the model runs; the engine keeps and copies nothing of them.

    Args:
        site: sites with any port but `probs`.
        keep: called as `keep(flowing)` wherever the selection holds, after the edits. It has to
            copy what it wants before it returns: the values are the model's own memory.

    Raises:
        InvalidInput: `keep` is no function, or a site has the port `probs`.

    Example:
        >>> norms = []
        >>> Stream("unet.mid_block", lambda flowing: norms.append(flowing.x.norm()), branch="cond")
        Stream(unet.mid_block, branch='cond')
    """

    keep: Callable[["Flowing"], None]

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.keep):
            raise InvalidInput(f"Stream: keep must be a function, got {type(self.keep).__name__}")
        for site in self.sites:
            if parse(site).port == "probs":
                raise InvalidInput(
                    f"Stream: {site} are attention probabilities, which no model holds in memory; "
                    "use Watch or Record for them"
                )

    def __repr__(self) -> str:
        return self.describe()


@dataclass(eq=False)
class Kept:
    """What a stream keeps in one kind of call; calls with the same have the same object.

    That is: the same site and selection, and `x` of the same shape, type and device. Its tensors
    are on the CPU.

    Attributes:
        branches: names kept, in order. rows: numbers in the run of the rows kept, in each branch.
        entries: their batch entries, branch after branch; index: the same as a tensor.
        tokens: token numbers kept, entry after entry; those of entry e of `entries` are
            `tokens[offsets[e] : offsets[e + 1]]`.
        hw: (height, width) where tokens are places of the picture, None where they are not.
        starts: number of the first of these tokens in each of `entries`: 0 but for image tokens
            that stand behind the text in one sequence.
    """

    site: Site
    branches: tuple[str, ...]
    rows: tuple[int, ...]
    entries: list[int]
    index: Int32[Tensor, " entries"]
    tokens: Int32[Tensor, " kept"]
    offsets: Int32[Tensor, " entries+1"]
    hw: tuple[int, int] | None
    starts: tuple[int, ...]
    map: TokenMap | None = None
    _shift: tuple[TokenLayout | None, Tensor] = field(init=False)

    def __post_init__(self):
        self._shift = (None, torch.zeros_like(self.index))

    def shift(self, layout: TokenLayout | ClockUnknown | None) -> Tensor:
        """[entries] int32, see `Flowing.shift`; made once for each call of a language model."""
        if self.map is not None and layout is not self._shift[0]:
            assert isinstance(layout, TokenLayout)
            own = self.map.own(layout)
            first = [int(self.tokens[at]) if at < len(self.tokens) else 0 for at in self._firsts]
            shift = [
                int(own[entry, at]) - at for entry, at in zip(self.entries, first, strict=True)
            ]
            self._shift = (layout, torch.tensor(shift, dtype=torch.int32))
        return self._shift[1]

    @property
    def _firsts(self) -> list[int]:
        return self.offsets[:-1].tolist()


class Flowing:
    """Activations of one call of a site, handed on while the model runs.

    Attributes:
        key: the part of this that stays from call to call (see `Kept`), to cache by.
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
        key: Kept,
        x: Float[Tensor, "batch tokens features"],
        minus: Float[Tensor, "batch tokens features"] | None,
        instant: Instant | None,
        now: Now,
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

    def __init__(self, request: Stream, number: int, site: Site, shared: Shared):
        self.request = request
        self.number = number
        self.site = site
        self._shared = shared
        self._known: dict[tuple, Kept] = {}
        self._last: tuple[int, int, int] = (-1, 0, 0)
        self._had: tuple[str, ...] = ()
        self._schedule: list[Instant] | None = None
        self._moments: dict[tuple[int, int], int] = {}

    def kept(self, place: Place, x: Tensor) -> Kept | None:
        """What the selection keeps in one kind of call; None where that is nothing.

        Raises:
            ClockUnknown: which tokens of a language model these are is unknown.
            InvalidInput: the attention mask leaves out tokens between those of a row.
        """
        found = kept_entries(self.request, place)
        if found is None:
            return None
        _check_positions(place, found.numbers)
        tokens, offsets = _tokens(place, found.numbers)
        return self._same(place, found, tokens, offsets, x) if len(tokens) else None

    def _same(
        self, place: Place, found: Entries, tokens: Tensor, offsets: Tensor, x: Tensor
    ) -> Kept:
        """The object that stands for all calls of this kind."""
        hw, starts = _picture(place, found.numbers)
        numbers = tokens.numpy().tobytes(), offsets.numpy().tobytes()
        token_map = place.sequence.map
        kind = (found.branches, found.rows, *numbers, hw, starts, token_map)
        kind = (*kind, x.shape, x.dtype, x.device)
        kept = self._known.get(kind)
        if kept is None:
            index = torch.tensor(found.numbers, dtype=torch.int32)
            kept = self._known[kind] = Kept(
                self.site,
                found.branches,
                found.rows,
                found.numbers,
                index,
                tokens,
                offsets,
                hw,
                starts,
                token_map if isinstance(token_map, TokenMap) else None,
            )
        return kept

    def hand_on(self, x: Tensor, minus: Tensor | None, kept: Kept, now: Now) -> None:
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
        self.request.keep(Flowing(kept, x, minus, instant, now, self))

    def _instant(self, now: Now) -> Instant | None:
        instant = now.instant
        if not isinstance(instant, Instant):
            if now.phase in ("denoise", "language"):
                raise ClockUnknown(f"{self.site.name}: streaming needs the step. {instant}")
            return None
        if not isinstance(now.branches, tuple):
            raise ClockUnknown(f"{self.site.name}: streaming needs the branch. {now.branches}")
        return instant

    def _check_once(self, now: Now, instant: Instant | None, kept: Kept) -> None:
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

    def moments(self, now: Now) -> dict[tuple[int, int], int] | None:
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


def _check_positions(place: Place, entries: list[int]) -> None:
    """Refuse tokens whose position among their row's own does not move along with them."""
    if place.sequence.now.tokens is None:
        return
    place.sequence.require_known()
    own = place.own
    assert own is not None
    chosen = (place.selected > 0).cpu().expand(place.batch, place.tokens)
    shift = own - torch.arange(place.tokens)
    for entry in entries:
        if len(shift[entry][chosen[entry]].unique()) > 1:
            raise InvalidInput(
                f"{place.site}: the attention mask leaves out tokens between those of row "
                f"{entry % place.rows}, so its positions have gaps; pad on one side only"
            )


def _tokens(place: Place, entries: list[int]) -> tuple[Tensor, Tensor]:
    """Token numbers of the entries after one another, int32, and where each entry's begin."""
    chosen = (place.selected > 0).cpu().expand(place.batch, place.tokens)[entries]
    offsets = torch.zeros(len(entries) + 1, dtype=torch.int32)
    offsets[1:] = chosen.sum(1).cumsum(0)
    return chosen.nonzero()[:, 1].int(), offsets


def _picture(place: Place, entries: list[int]) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """(height, width) of the image tokens, and the first of them in each entry."""
    sequence = place.sequence
    if sequence.hw is None:
        return None, (0,) * len(entries)
    return sequence.hw, tuple(sequence.region(entry)[0] for entry in entries)
