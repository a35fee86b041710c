"""Token selections: from indices, masks, words and boxes to the strength of every token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._selection import Box, mask_of
from dreamreader.engine._token_layout import PaddingUnknown, TokenLayout, TokenMap
from dreamreader.errors import ClockUnknown, InvalidInput


@dataclass(frozen=True, eq=False)
class SiteTokens:
    """The tokens at a site during one call.

    Args:
        name: of the site, for messages.
        tokens: length of the sequence there.
        batch: entries of the batch.
        hw: grid of image tokens where known.
        kind: `image`, `text`, `joint` or `unknown`.
        stream: only this stream of a joint sequence.
        now: the running call.
        map: which tokens of a language model's call these are, or why that is unknown; None
            elsewhere, where every entry is a token.
    """

    name: str
    tokens: int
    batch: int
    hw: tuple[int, int] | None
    kind: str
    stream: str | None
    now: CallContext
    map: TokenMap | ClockUnknown | None = None

    def region(self, entry: int) -> tuple[int, int]:
        """First and last + 1 of the tokens of the stream for one batch entry."""
        if self.stream is None or self.kind == self.stream:
            return 0, self.tokens
        if self.kind != "joint" or self.now.layout is None:
            raise InvalidInput(
                f"{self.name}: there is no {self.stream} stream here, the {self.tokens} tokens are "
                f"{self.kind}"
            )
        return self.now.layout.start_of(self.stream, entry, self.tokens)

    @cached_property
    def layout(self) -> TokenLayout | None:
        """The tokens of the call that this sequence is of; None outside language models."""
        if isinstance(self.map, TokenMap) and isinstance(self.now.tokens, TokenLayout):
            return self.map.layout(self.now.tokens)
        return None

    @cached_property
    def own(self) -> Tensor | None:
        """[batch, tokens] int64: index among the row's own tokens, -1 at padding; None if plain."""
        if self.layout is None:
            return None
        assert isinstance(self.map, TokenMap) and isinstance(self.now.tokens, TokenLayout)
        return self.map.own(self.now.tokens)

    @property
    def padded(self) -> bool:
        """Whether the running call has padding, or may have."""
        if isinstance(self.map, PaddingUnknown):
            return True
        return isinstance(self.now.tokens, TokenLayout) and self.now.tokens.padded

    def prompt(self, entry: int) -> int:
        """Own tokens of a row's prompt.

        Raises:
            ClockUnknown: where the prompt ends is unknown.
        """
        assert self.layout is not None
        prompts = self.layout.prompts
        if isinstance(prompts, ClockUnknown):
            raise ClockUnknown(f"{self.name}: {prompts}")
        return prompts[entry]

    def require_known(self) -> None:
        """Refuse what depends on which tokens these are, where that is unknown."""
        if isinstance(self.map, ClockUnknown):
            raise ClockUnknown(f"{self.name}: which tokens these are is asked for. {self.map}")


def site_tokens(
    name: str,
    tokens: int,
    batch: int,
    hw: tuple[int, ...] | None,
    stream: str | None,
    now: CallContext,
    crosses: Callable[[], bool | None],
) -> SiteTokens:
    """What the tokens at a site are, by the running call's layout; see `StreamLayout.kind_at`."""
    if hw is not None:
        grid = (hw[-2], hw[-1]) if len(hw) > 1 else None
        return SiteTokens(name, tokens, batch, grid, "image", stream, now)
    if now.phase in ("text", "language"):
        return SiteTokens(name, tokens, batch, None, "text", stream, now)
    if now.layout is None:
        return SiteTokens(name, tokens, batch, None, "unknown", stream, now)
    kind = now.layout.kind_at(name, tokens, crosses)
    grid = now.layout.grid if kind == "joint" and stream == "image" else now.layout.grid_of(tokens)
    return SiteTokens(
        name, tokens, batch, grid if kind in ("image", "joint") else None, kind, stream, now
    )


def select(
    chosen: Any,
    place: SiteTokens,
    ids_of: Callable[[str], list[list[int]]] | None = None,
    asked: Tensor | None = None,
) -> Tensor | None:
    """Strength of every token under a selection: [tokens] or [batch, tokens]; None: all alike.

    Args:
        chosen: what the request says, normalized.
        place: the sequence at the site.
        ids_of: finds the token indices of a word, for each batch entry.
        asked: [batch], 0 at entries that are left out by rows or branch: what they have does not
            matter.

    Raises:
        ClockUnknown: which tokens these are is unknown, and matters.
    """
    if place.map is not None and (chosen is not None or place.padded):
        place.require_known()
    if isinstance(chosen, str | tuple):
        place = _text_of(place)
    regions = (
        {place.region(entry) for entry in range(place.batch)}
        if place.stream
        else {(0, place.tokens)}
    )
    own = place.own
    padded = own is not None and bool((own < 0).any())
    if chosen is None and regions == {(0, place.tokens)} and not padded:
        return None
    words = _words(chosen, place, ids_of)
    ragged = words is not None or len(regions) > 1 or own is not None
    entries = []
    for entry in range(place.batch if ragged else 1):
        mask = torch.zeros(place.tokens)
        if ragged and asked is not None and not asked[entry]:
            entries.append(mask)
            continue
        start, stop = place.region(entry)
        indices = words[entry] if words is not None else chosen
        if own is not None:
            mask[start:stop] = _of_own(indices, own[entry, start:stop], place, entry)
        else:
            mask[start:stop] = _of_sequence(indices, stop - start, place)
        entries.append(mask)
    return torch.stack(entries) if ragged else entries[0]


def _text_of(place: SiteTokens) -> SiteTokens:
    """The text tokens at a site, which alone spell words.

    Raises:
        InvalidInput: there are none, or which tokens these are is unknown.
    """
    kind = place.stream if place.kind == "joint" and place.stream else place.kind
    if kind not in ("text", "joint"):
        raise InvalidInput(
            f"{place.name}: a word needs text tokens, the {place.tokens} tokens here are {kind}"
        )
    return replace(place, stream="text") if kind == "joint" else place


def _words(
    chosen: Any, place: SiteTokens, ids_of: Callable[[str], list[list[int]]] | None
) -> list[list[int]] | None:
    """Token indices of a word or several, for each batch entry; None where none is asked for."""
    if not isinstance(chosen, str | tuple):
        return None
    if ids_of is None:
        raise ClockUnknown(f"{place.name}: words of the prompt are not known here")
    found = [ids_of(word) for word in ((chosen,) if isinstance(chosen, str) else chosen)]
    return [sorted({at for part in parts for at in part}) for parts in zip(*found, strict=True)]


def _of_sequence(chosen: Any, length: int, place: SiteTokens) -> Tensor:
    """[length] strengths of the tokens of one stream, counted as they stand."""
    if chosen is None:
        return torch.ones(length)
    if isinstance(chosen, Box):
        if place.hw is None or place.hw[0] * place.hw[1] != length:
            raise InvalidInput(
                f"{place.name}: a Box needs image tokens, the {length} tokens here are {place.kind}"
            )
        return chosen.mask(*place.hw).float()
    if isinstance(chosen, Tensor):
        if chosen.dim() != 1 and tuple(chosen.shape) != place.hw:
            here = f"the grid here is {list(place.hw)}" if place.hw else "no grid is known here"
            raise InvalidInput(
                f"{place.name}: tokens is a mask of {list(chosen.shape)}, {here}; give a mask "
                f"[{length}] of the tokens"
            )
        if chosen.numel() != length:
            raise InvalidInput(
                f"{place.name}: tokens is a mask of {chosen.numel()}, there are {length} tokens"
            )
        chosen = chosen.flatten()
    return mask_of(chosen, length, place.name, "token").float()


def _of_own(chosen: Any, own: Tensor, place: SiteTokens, entry: int) -> Tensor:
    """Strengths in a language model: indices count the row's own tokens, padding left out.

    Negative indices count from the end of the prompt, and so do masks cover the prompt.
    """
    real = own >= 0
    if chosen is None:
        return real.float()
    if isinstance(chosen, Box):
        raise InvalidInput(f"{place.name}: a Box needs image tokens, these are text")
    if isinstance(chosen, Tensor):
        prompt = place.prompt(entry)
        if chosen.dim() != 1:
            raise InvalidInput(
                f"{place.name}: tokens is a mask of {list(chosen.shape)}, that of a text is "
                f"[{prompt}], its tokens"
            )
        if chosen.numel() != prompt:
            raise InvalidInput(
                f"{place.name}: tokens is a mask of {chosen.numel()}, row {entry} has {prompt} "
                "tokens"
            )
        inside = real & (own < prompt)
        mask = torch.zeros(len(own))
        mask[inside] = mask_of(chosen, prompt, place.name).float()[own[inside]]
        return mask
    if isinstance(chosen, slice) and not _from_end(chosen):
        start, step = chosen.start or 0, chosen.step or 1
        stop = chosen.stop if chosen.stop is not None else int(own.max()) + 1
        return ((own >= start) & (own < stop) & ((own - start) % step == 0) & real).float()
    if isinstance(chosen, range) and chosen and min(chosen[0], chosen[-1]) >= 0:
        return (torch.tensor([at in chosen for at in own.tolist()]) & real).float()
    wanted = _resolve_indices(chosen, place, entry)
    return (torch.isin(own, torch.tensor(wanted, dtype=own.dtype)) & real).float()


def _from_end(chosen: slice) -> bool:
    return any((each or 0) < 0 for each in (chosen.start, chosen.stop, chosen.step))


def _resolve_indices(chosen: Any, place: SiteTokens, entry: int) -> list[int]:
    """Own indices that a selection means; negative ones are counted from the prompt's end."""
    if isinstance(chosen, slice):
        return list(range(*chosen.indices(place.prompt(entry))))
    listed: Sequence[int] = [chosen] if isinstance(chosen, int) else list(chosen)
    if all(each >= 0 for each in listed):
        return list(listed)
    prompt = place.prompt(entry)
    wanted = [each + prompt if each < 0 else each for each in listed]
    if any(each < 0 for each in wanted):
        raise InvalidInput(f"{place.name}: tokens={chosen}, row {entry} has {prompt} tokens")
    return wanted
