"""Which entries of the tensors of one call are which row's own tokens.

A language model's call has one `TokenLayout`; what a site's values hold of it is a `TokenMap`.
Every reader of positions (recordings, edits, streams, watches, harvests) asks these two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import ClockUnknown


class RowsUnknown(ClockUnknown):
    """Not even which entries are which row is known.

    Attributes:
        rows: of the call; None where this is unknown too.
    """

    def __init__(self, why: str, rows: int | None = None):
        super().__init__(why)
        self.rows = rows


class PaddingUnknown(ClockUnknown):
    """Not even whether some of the entries are padding is known."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The tokens of one call of a language model.

    A row's own tokens are counted from 0, padding left out, over the cache and all calls of a run.

    Args:
        rows: sequences in the batch. length: tokens of each that come in.
        starts: own tokens of each sequence that the cache holds already.
        real: [rows, length] bool on the CPU, False at padding; None where there is none.
        prompts: own tokens of each sequence's prompt, or why they are unknown.
        kept: the tokens that go on to the modules behind the last block, None for all.
        encoder: tokens of the encoder's states that a decoder attends to.
        beams: sequences of each row of the run, one after the other.
    """

    rows: int
    length: int
    starts: tuple[int, ...]
    real: Tensor | None
    prompts: tuple[int, ...] | ClockUnknown
    kept: tuple[int, ...] | None = None
    encoder: "TokenLayout | None" = None
    beams: int = 1

    @cached_property
    def key(self) -> tuple:
        """Everything that decides which tokens a selection means."""
        prompts = self.prompts if isinstance(self.prompts, tuple) else None
        return (*self.placeless_key, self.starts, prompts)

    @cached_property
    def placeless_key(self) -> tuple:
        """Everything that decides which entries are padding."""
        real = None if self.real is None else self.real.numpy().tobytes()
        encoder = None if self.encoder is None else self.encoder.key
        return (self.rows, self.length, real, self.kept, encoder, self.beams)

    @cached_property
    def own(self) -> Tensor:
        """[rows, length] int64: index of each entry among its row's own tokens, -1 for padding."""
        starts = torch.tensor(self.starts).unsqueeze(1)
        if self.real is None:
            return starts + torch.arange(self.length)
        return torch.where(self.real, starts + self.real.cumsum(1) - 1, -1)

    @property
    def padded(self) -> bool:
        """Whether some entry is padding, also of the encoder's."""
        return self.real is not None or (self.encoder is not None and self.encoder.padded)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens values in this call can have."""
        found = [self.length]
        found += [len(self.kept)] if self.kept is not None else []
        return (*found, self.encoder.length) if self.encoder is not None else tuple(found)

    def unflatten(self, count: int) -> tuple[int, int] | None:
        """(rows, tokens) of a flattened batch with `count` entries; None where it is none."""
        if self.length > 1 and count == self.rows * self.length:
            return self.rows, self.length
        kept = None if self.kept is None else len(self.kept)
        return (self.rows, kept) if kept and kept > 1 and count == self.rows * kept else None

    def map_of(
        self, batch: int, tokens: int | None, site: str, reads_encoder: bool | None
    ) -> "TokenMap | ClockUnknown":
        """What [batch, tokens, ...] values hold of this call.

        Args:
            tokens: None where the values have no dimension of tokens.
            reads_encoder: whether the module works on the encoder's states; None where the lengths
                have to tell.
        """
        if tokens is None:
            if batch == self.rows and self.length == 1:
                return TokenMap()
            return ClockUnknown(
                f"{site}: its values have no dimension of tokens ({batch} entries in a call with "
                f"{self.rows} rows of {self.length} tokens)"
            )
        shared = batch == 1 < self.rows and bool((self.own == self.own[:1]).all())
        if batch == self.rows or shared:
            encoder = self.encoder
            if encoder is not None and tokens == encoder.length and reads_encoder is not False:
                if reads_encoder or tokens != self.length:
                    return TokenMap(of_encoder=True, shared=shared)
                return ClockUnknown(
                    f"{site}: encoder and decoder both have {tokens} tokens, and which of them its "
                    "values are of is unknown"
                )
            if self.kept is not None and tokens == len(self.kept):
                if tokens == self.length:
                    return ClockUnknown(
                        f"{site}: whether its {tokens} tokens are all or those that logits_to_keep "
                        "leaves, in another order, is unknown"
                    )
                return TokenMap(self.kept, shared=shared)
            if tokens == self.length:
                return TokenMap(shared=shared)
        return RowsUnknown(
            f"{site}: has {batch} entries of {tokens} tokens in a call with {self.rows} rows of "
            f"{self.length} tokens, so which token each belongs to is unknown",
            self.rows,
        )

    def of_beams(self, beams: int) -> "TokenLayout":
        """The same prompts, each for several sequences one after the other."""
        if beams == 1:
            return self
        real = None if self.real is None else self.real.repeat_interleave(beams, 0)
        prompts = (
            self.prompts if isinstance(self.prompts, ClockUnknown) else _each(self.prompts, beams)
        )
        return TokenLayout(
            self.rows * beams, self.length, _each(self.starts, beams), real, prompts, beams=beams
        )


@dataclass(frozen=True)
class TokenMap:
    """Which tokens of a call a site's values hold, the same at every call of one kind.

    Args:
        columns: numbers of the tokens of the call, in order; None for all.
        of_encoder: they are the encoder's tokens.
        shared: one entry stands for all rows.
    """

    columns: tuple[int, ...] | None = None
    of_encoder: bool = False
    shared: bool = False

    def own(self, layout: TokenLayout) -> Tensor:
        """[batch, tokens] int64: index among the row's own tokens, -1 for padding."""
        layout = self.layout(layout)
        own = layout.own[:1] if self.shared else layout.own
        return own if self.columns is None else own[:, list(self.columns)]

    def layout(self, layout: TokenLayout) -> TokenLayout:
        """The layout that the tokens belong to: that of the call, or of its encoder."""
        if self.of_encoder:
            assert layout.encoder is not None
            return layout.encoder
        return layout


def real_tokens(mask: Any, rows: int, past: int, length: int) -> Tensor | None | ClockUnknown:
    """Which tokens are no padding by an attention mask: [rows, n] bool on the CPU, None for all.

    n is `past + length` where the mask says so much, else `length`. Taken are masks [rows, keys]
    of integers, truth values or 0.0 and 1.0; masks [rows, heads or 1, queries or 1, keys] of truth
    values or of numbers to be added; and dicts of them by kind of layer.
    """
    if isinstance(mask, dict):
        return _agree([real_tokens(each, rows, past, length) for each in mask.values()])
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shape = f" of {list(mask.shape)}" if isinstance(mask, Tensor) else ""
        return ClockUnknown(
            f"the attention mask is a {type(mask).__name__}{shape}, which does not say where "
            "padding is"
        )
    mask = mask.detach()
    found = _of_flat(mask, past, length) if mask.dim() == 2 else _of_square(mask, past, length)
    if isinstance(found, ClockUnknown):
        return found
    if found.shape[0] == 1:
        found = found.expand(rows, -1)
    if found.shape[0] != rows:
        return ClockUnknown(
            f"the attention mask has {found.shape[0]} rows, the call {rows}: whose padding is "
            "whose is unknown"
        )
    found = found.cpu().contiguous()
    return None if bool(found.all()) else found


def _of_flat(mask: Tensor, past: int, length: int) -> Tensor | ClockUnknown:
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        return ClockUnknown("the attention mask [rows, tokens] holds other numbers than 0 and 1")
    if mask.shape[1] == past + length:
        return mask != 0
    return ClockUnknown(
        f"the attention mask covers {mask.shape[1]} tokens, the call has {length} behind {past} "
        "cached ones"
    )


def _of_square(mask: Tensor, past: int, length: int) -> Tensor | ClockUnknown:
    """From what each query sees: all see the same keys, or every real token sees itself."""
    if mask.is_floating_point():
        if not bool(((mask == 0) | (mask <= -1000)).all()):
            return ClockUnknown("the attention mask adds more than 0 and large negative numbers")
        seen = mask == 0
    else:
        seen = mask != 0
    seen = seen[:, 0] if bool((seen == seen[:, :1]).all()) else seen.any(1)  # [rows, queries, keys]
    if seen.shape[1] == 1 and length > 1 or (length > 1 and bool((seen == seen[:, :1]).all())):
        keys = seen[:, 0]
        if keys.shape[1] < past + length or bool(keys[:, past + length :].any()):
            return ClockUnknown("the attention mask is wider than the tokens it is for")
        return keys[:, : past + length]
    if seen.shape[1] != length or seen.shape[2] < past + length:
        return ClockUnknown(
            f"the attention mask is {list(mask.shape)}, the call has {length} tokens behind {past} "
            "cached ones"
        )
    own = seen[:, :, past : past + length]
    if bool(own.triu(1).any()) or bool(seen[:, :, past + length :].any()):
        return ClockUnknown(
            "queries see tokens behind their own and not all the same, so the attention mask does "
            "not say where padding is"
        )
    itself = own.diagonal(dim1=1, dim2=2)
    behind = own.tril(-1)
    alone = itself & ~behind.any(1) & ~behind.any(2) & ~seen[:, :, :past].any(2)
    if length > 1 and bool(alone.any()) and bool(itself.all()):
        return ClockUnknown(
            "some tokens see themselves alone and are seen by none, so the attention mask does not "
            "say whether they are padding"
        )
    return itself


def _agree(found: Sequence[Tensor | None | ClockUnknown]) -> Tensor | None | ClockUnknown:
    """What the masks of several kinds of layers say together."""
    known = [each for each in found if each is not None]
    for each in known:
        if isinstance(each, ClockUnknown):
            return each
    tensors = [each for each in known if isinstance(each, Tensor)]
    if not tensors:
        return None
    if len(tensors) != len(found) or any(not torch.equal(each, tensors[0]) for each in tensors):
        return ClockUnknown("the attention masks of the kinds of layers mark different padding")
    return tensors[0]


def _each(values: tuple[int, ...], times: int) -> tuple[int, ...]:
    return tuple(value for value in values for _ in range(times))
