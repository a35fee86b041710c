"""The part of a batch that a request holds: edits, recordings, watches and streams share it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int32
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._sites import Site
from dreamreader.engine._token_layout import TokenLayout, TokenMap
from dreamreader.engine._tokens import SiteTokens
from dreamreader.errors import ClockUnknown, InvalidInput


@dataclass(eq=False)
class Selection:
    """What one request holds at a site in one kind of call; made once, used by all of them.

    Attributes:
        branches: names held, in order.
        rows: numbers in the run of the rows held, in each branch; one with several beams stands
            once for each.
        entries: batch entries of these, branch after branch.
        strength: [batch or 1, tokens or 1] of every token, 0 where it is left out.
        sequence: the tokens of the site.
        size: rows of each branch in the batch, held or not.
        every_token: the request chooses none among the tokens.
        heads: of the site, None where it has none. device: of its values.
    """

    site: Site
    branches: tuple[str, ...]
    rows: tuple[int, ...]
    entries: list[int]
    strength: Tensor
    sequence: SiteTokens
    size: int
    every_token: bool
    heads: int | None
    device: torch.device
    _shift: tuple[TokenLayout | None, Tensor] | None = None

    @cached_property
    def hw(self) -> tuple[int, int] | None:
        """(height, width) where tokens are places of the picture, None where they are not."""
        return self.sequence.hw

    @cached_property
    def map(self) -> TokenMap | ClockUnknown | None:
        """Which tokens of a language model's call the site has; None elsewhere."""
        return self.sequence.map

    # of recordings: tensors where the values are

    @cached_property
    def picked(self) -> Tensor | None:
        """The entries as a tensor; None for all of them in order."""
        if self.entries == list(range(self.sequence.batch)):
            return None
        return torch.tensor(self.entries, device=self.device)

    @cached_property
    def columns(self) -> Tensor | None:
        """Token numbers held, [n] or [entries, n] with -1 where a row has fewer; None for all.

        Raises:
            ClockUnknown: which tokens of a language model these are is unknown.
            InvalidInput: the rows hold different numbers of tokens.
        """
        sequence, chosen = self.sequence, self.strength
        if self.every_token:
            if sequence.padded:
                sequence.require_known()
            if sequence.stream is None:
                return None  # padding stays, so that every row has the same length
        if chosen.shape[0] > 1:
            chosen = chosen[self.entries]
        if chosen.shape[1] == 1 and sequence.tokens > 1 or bool((chosen != 0).all()):
            return None
        held = [row.nonzero().flatten() for row in chosen]
        if len({len(each) for each in held}) > 1:
            if sequence.own is None or not all(map(len, held)):
                counts = ", ".join(str(len(each)) for each in held)
                raise InvalidInput(
                    f"recording {self.site.name}: the rows keep different numbers of tokens "
                    f"({counts}); record them apart, or all tokens"
                )
            turned = [each.flip(0) for each in held]
            padded = pad_sequence(turned, batch_first=True, padding_value=-1).flip(1)
            return padded.to(self.device)
        same = all(torch.equal(each, held[0]) for each in held)
        return (held[0] if same else torch.stack(held)).to(self.device)

    @cached_property
    def filled(self) -> Tensor | None:
        """[entries, n] true where a row has no token of its own; None where all of them have."""
        if self.columns is None or self.columns.dim() == 1:
            return None
        filled = self.columns < 0
        return filled if bool(filled.any()) else None

    @property
    def grid(self) -> tuple[int, int] | None:
        """`hw` where every token of it is held, else None."""
        stream, kind = self.sequence.stream, self.sequence.kind
        return self.hw if self.every_token and stream in (None, "image", kind) else None

    def gather(self, x: Tensor) -> Tensor:
        """The entries and tokens held of x [batch, tokens, ...]."""
        if self.picked is not None:
            x = x.index_select(0, self.picked)
        return x if self.columns is None else _gather(x, self.columns, self.filled)

    def positions(self, now: CallContext) -> Tensor | None:
        """[entries, tokens] own index of every token held, -1 at padding; None if not of a text."""
        if not isinstance(self.map, TokenMap) or not isinstance(now.tokens, TokenLayout):
            return None
        own = self.map.own(now.tokens)[self.entries]
        if self.columns is None:
            return own
        filled = None if self.filled is None else self.filled.cpu()
        return _gather(own, self.columns.cpu(), filled, -1)

    # of streams: on the CPU, entry after entry

    @cached_property
    def index(self) -> Int32[Tensor, " entries"]:
        """The entries."""
        return torch.tensor(self.entries, dtype=torch.int32)

    @cached_property
    def tokens(self) -> Int32[Tensor, " kept"]:
        """Token numbers held; those of entry e are `tokens[offsets[e] : offsets[e + 1]]`."""
        return self._held.nonzero()[:, 1].int()

    @cached_property
    def offsets(self) -> Int32[Tensor, " entries+1"]:
        """Where the tokens of each entry begin."""
        offsets = torch.zeros(len(self.entries) + 1, dtype=torch.int32)
        offsets[1:] = self._held.sum(1).cumsum(0)
        return offsets

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Number of the first of the tokens of `hw` in each entry, not 0 behind a text."""
        if self.hw is None:
            return (0,) * len(self.entries)
        return tuple(self.sequence.region(entry)[0] for entry in self.entries)

    def shift(self, layout: TokenLayout | ClockUnknown | None) -> Int32[Tensor, " entries"]:
        """What makes a token number the row's own position; made once for each call of a text."""
        if self._shift is None:
            self._shift = (None, torch.zeros_like(self.index))
        if isinstance(self.map, TokenMap) and layout is not self._shift[0]:
            assert isinstance(layout, TokenLayout)
            own, held = self.map.own(layout), len(self.tokens)
            begins = self.offsets[:-1].tolist()
            first = [int(self.tokens[at]) if at < held else 0 for at in begins]
            moved = [int(own[e, at]) - at for e, at in zip(self.entries, first, strict=True)]
            self._shift = (layout, torch.tensor(moved, dtype=torch.int32))
        return self._shift[1]

    def require_positions(self) -> None:
        """Refuse tokens whose position among their row's own does not move along with them.

        Raises:
            ClockUnknown: which tokens of a language model these are is unknown.
            InvalidInput: the attention mask leaves out tokens between those of a row.
        """
        if self.sequence.now.tokens is None:
            return
        self.sequence.require_known()
        own = self.sequence.own
        assert own is not None
        shift = own - torch.arange(self.sequence.tokens)
        for entry, held in zip(self.entries, self._held, strict=True):
            if len(shift[entry][held].unique()) > 1:
                raise InvalidInput(
                    f"{self.site.name}: the attention mask leaves out tokens between those of row "
                    f"{entry % self.size}, so its positions have gaps; pad on one side only"
                )

    @cached_property
    def _held(self) -> Tensor:
        """[entries, tokens] bool."""
        shape = (self.sequence.batch, self.sequence.tokens)
        return (self.strength > 0).cpu().expand(shape)[self.entries]


def _gather(x: Tensor, tokens: Tensor, filled: Tensor | None = None, value: int = 0) -> Tensor:
    """The tokens of x [entries, tokens, ...] by their numbers, and `value` where it is filled."""
    tokens = tokens.to(x.device)
    if tokens.dim() == 1:
        return x.index_select(1, tokens)
    if filled is not None:
        found = _gather(x, tokens.clamp(min=0))
        return found.masked_fill(filled.reshape(*filled.shape, *(1,) * (x.dim() - 2)), value)
    index = tokens.reshape(*tokens.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
