"""Readers of attentions, and what they are told of each call: rows, time, image and text tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dreamreader.engine._cache import RunRow
from dreamreader.engine._call_context import CallContext
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._pattern import parse
from dreamreader.engine._probs import Attention
from dreamreader.engine._request import Request
from dreamreader.engine._resolved import Selection
from dreamreader.engine._session_state import SessionState
from dreamreader.errors import InvalidInput

Region = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Watch(Request):
    """A reader of attentions while they run; the engine itself stores nothing of them.

    Args:
        site: sites with the port `probs`.
        callback: called as `callback(attention, call)` wherever the selection holds. `attention`
            has the batch entries of the selection only, `call` says which they are. Where the model
            forms its attention in shares (attention slicing) it is called with each share.

    Raises:
        InvalidInput: a site has another port, or `tokens` is given: the whole sequence is seen.

    Example:
        >>> seen = []
        >>> Watch("unet.**.attn2:probs", lambda attention, call: seen.append(attention.shape))
        Watch(unet.**.attn2:probs)
    """

    callback: Callable[[Attention, "AttentionCall"], None]

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.callback):
            raise InvalidInput(
                f"Watch: callback must be a function, got {type(self.callback).__name__}"
            )
        if self.tokens is not None:
            raise InvalidInput("Watch: tokens has no meaning here, the whole attention is seen")
        for site in self.sites:
            if parse(site).port != "probs":
                raise InvalidInput(f"Watch: {site} is no attention; name its probs: {site}:probs")

    def __repr__(self) -> str:
        return self.describe()


@dataclass(frozen=True, eq=False)
class Watcher:
    """A `Watch` in a session, with the number of its request."""

    request: Watch
    number: int


class AttentionCall:
    """One call of a watched attention. Its entries are branch after branch, rows in order.

    Attributes:
        site: name of the site. branches: kept by the selection.
        run: equal for the calls of one run of the subject, and for no others.
        instant: step, timestep, sigma, fraction and evaluation; None where time is unknown.
    """

    def __init__(self, seen: Selection, keys: int, now: CallContext, shared: SessionState):
        self._seen = seen
        self._keys = keys
        self._now = now
        self._shared = shared
        self.site = seen.site.name
        self.branches = seen.branches
        self.run: object = (shared, now.run)
        self.instant = now.instant if isinstance(now.instant, StepInfo) else None

    @cached_property
    def rows(self) -> tuple[RunRow, ...]:
        """Number, prompt and seed of the rows kept, the same in each branch."""
        return tuple(map(self._shared.row, self._seen.rows))

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of the image queries; None where they are no grid."""
        sequence, layout = self._seen.sequence, self._now.layout
        if sequence.kind == "joint" and layout is not None:
            return layout.grid
        return sequence.hw

    @property
    def whole_grid(self) -> tuple[int, int] | None:
        """The finest grid of the denoiser: latents of a UNet, image tokens of a transformer."""
        return self._now.layout.grid if self._now.layout is not None else None

    @property
    def has_words(self) -> bool:
        """Whether image queries attend to text keys here."""
        return self._image_kind and self._text_kind is not None

    @property
    def image(self) -> tuple[Region, ...]:
        """First and last + 1 of the image queries, for each entry.

        Raises:
            InvalidInput: there are none.
        """
        if not self._image_kind:
            kind = self._seen.sequence.kind
            raise InvalidInput(f"{self.site}: its queries are {kind}, no image tokens")
        if self._seen.sequence.kind == "image":
            return ((0, self._seen.sequence.tokens),) * len(self._seen.entries)
        return self._regions("image")

    @property
    def text(self) -> tuple[Region, ...]:
        """First and last + 1 of the text keys, for each entry.

        Raises:
            InvalidInput: there are none.
        """
        if self._text_kind is None:
            raise InvalidInput(f"{self.site}: its {self._keys} keys hold no text tokens")
        if self._text_kind == "text":
            return ((0, self._keys),) * len(self._seen.entries)
        return self._regions("text")

    def positions(self, words: Sequence[str]) -> list[list[int]]:
        """Keys that spell the word of each entry, at all its occurrences; none where it has none.

        Args:
            words: one for each row kept.
        """
        text, found = self.text, []
        for branch_number, branch in enumerate(self.branches):
            known: dict[str, list[list[int]] | None] = {}
            for row, word in enumerate(words):
                if word not in known:
                    known[word] = self._words.positions(
                        word, self._now, self.site, branch, self._seen.size
                    )
                start, stop = text[branch_number * len(words) + row]
                found.append(self._keep(known[word], row, start, stop))
        return found

    def prompt(self) -> list[list[int]]:
        """Keys of each entry's prompt, without start, end and padding."""
        text, found, rows = self.text, [], len(self._seen.rows)
        for branch_number, branch in enumerate(self.branches):
            places = self._words.prompt(self._now, self.site, branch, self._seen.size)
            for row in range(rows):
                start, stop = text[branch_number * rows + row]
                found.append(self._keep(places, row, start, stop))
        return found

    @property
    def _words(self):
        return self._shared.words

    def _keep(self, places: list[list[int]] | None, row: int, start: int, stop: int) -> list[int]:
        """Keys of one row; what the encoder or the model cut off is left out."""
        if places is None:
            return []
        own = places[self._seen.entries[row] % self._seen.size]
        return [start + at for at in own if start + at < stop]

    def _regions(self, stream: str) -> tuple[Region, ...]:
        layout = self._now.layout
        assert layout is not None
        tokens = self._seen.sequence.tokens
        return tuple(layout.start_of(stream, each, tokens) for each in self._seen.entries)

    @cached_property
    def _image_kind(self) -> bool:
        return self._seen.sequence.kind in ("image", "joint")

    @cached_property
    def _text_kind(self) -> str | None:
        """`text`, `joint` or None: what the keys hold."""
        layout, keys, queries = self._now.layout, self._keys, self._seen.sequence
        if layout is None or self._now.phase != "denoise":
            return None
        if queries.kind == "joint":
            return "joint" if keys == queries.tokens else None
        cross = getattr(self._seen.site.tap.module, "is_cross_attention", True)
        # As many text tokens as image tokens: the module knows where its keys are from.
        return "text" if keys == layout.text and (keys != queries.tokens or cross) else None
