"""Token selections: from indices, masks, words and boxes to the strength of every token."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine.now import Now
from dreamreader.engine.request import Box
from dreamreader.errors import ClockUnknown, InvalidInput


@dataclass(frozen=True, eq=False)
class Sequence_:
    """The tokens at a site during one call.

    Args:
        name: of the site, for messages.
        tokens: length of the sequence there.
        batch: entries of the batch.
        hw: grid of image tokens where known.
        kind: `image`, `text`, `joint` or `unknown`.
        stream: only this stream of a joint sequence.
        now: the running call.
    """

    name: str
    tokens: int
    batch: int
    hw: tuple[int, int] | None
    kind: str
    stream: str | None
    now: Now

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


def sequence(
    name: str, tokens: int, batch: int, hw: tuple[int, ...] | None, stream: str | None, now: Now
) -> Sequence_:
    """What the tokens at a site are, from the layout of the running call."""
    if hw is not None:
        return Sequence_(
            name, tokens, batch, (hw[-2], hw[-1]) if len(hw) > 1 else None, "image", stream, now
        )
    if now.phase in ("text", "language"):
        return Sequence_(name, tokens, batch, None, "text", stream, now)
    if now.layout is None:
        return Sequence_(name, tokens, batch, None, "unknown", stream, now)
    kind = now.layout.kind_of(tokens)
    if kind == "image" and tokens == now.layout.text and re.search(r"attn2:[kv]$|\.text$", name):
        kind = "text"  # as many text tokens as cells: the port decides
    grid = now.layout.grid if kind == "joint" and stream == "image" else now.layout.grid_of(tokens)
    return Sequence_(name, tokens, batch, grid if kind != "text" else None, kind, stream, now)


def select(
    chosen: Any, place: Sequence_, ids_of: Callable[[str], list[list[int]]] | None = None
) -> Tensor | None:
    """Strength of every token under a selection: [tokens] or [batch, tokens]; None: all alike.

    Args:
        chosen: what the request says.
        place: the sequence at the site.
        ids_of: finds the token indices of a word, for each batch entry.
    """
    regions = (
        {place.region(entry) for entry in range(place.batch)}
        if place.stream
        else {(0, place.tokens)}
    )
    pads = place.now.positions.pads if place.now.positions is not None else ()
    if chosen is None and regions == {(0, place.tokens)} and not any(pads):
        return None
    if isinstance(chosen, str) and ids_of is None:
        raise ClockUnknown(f"{place.name}: words of the prompt are not known here")
    entries = []
    words = ids_of(chosen) if isinstance(chosen, str) and ids_of is not None else None
    ragged = words is not None or len(regions) > 1 or place.now.positions is not None
    for entry in range(place.batch if ragged else 1):
        start, stop = place.region(entry)
        mask = torch.zeros(place.tokens)
        indices = words[entry] if words is not None else chosen
        mask[start:stop] = _within(indices, stop - start, place, entry)
        entries.append(mask)
    return torch.stack(entries) if ragged else entries[0]


def _within(chosen: Any, length: int, place: Sequence_, entry: int) -> Tensor:
    """[length] strengths of the tokens of one stream of one batch entry."""
    if place.now.positions is not None:
        return _positions(chosen, length, place, entry)
    if chosen is None:
        return torch.ones(length)
    if isinstance(chosen, Box):
        if place.hw is None or place.hw[0] * place.hw[1] != length:
            raise InvalidInput(
                f"{place.name}: a Box needs image tokens, the {length} tokens here are {place.kind}"
            )
        return chosen.mask(*place.hw).float()
    if isinstance(chosen, Tensor) and (chosen.dtype == torch.bool or chosen.is_floating_point()):
        if chosen.dim() == 2 and place.hw is not None and tuple(chosen.shape) != place.hw:
            raise InvalidInput(
                f"{place.name}: tokens is a mask of {list(chosen.shape)}, the grid here is "
                f"{list(place.hw)}"
            )
        if chosen.numel() != length:
            raise InvalidInput(
                f"{place.name}: tokens is a mask of {chosen.numel()}, there are {length} tokens"
            )
        return chosen.detach().flatten().float().cpu()
    mask = torch.zeros(length)
    mask[_indices(chosen, length, place)] = 1
    return mask


def _positions(chosen: Any, length: int, place: Sequence_, entry: int) -> Tensor:
    """Strengths in a language model: indices count the row's own tokens, padding left out.

    Negative indices count from the end of the prompt, and so do masks cover the prompt.
    """
    positions = place.now.positions
    assert positions is not None
    pad = positions.pads[entry] if entry < len(positions.pads) else 0
    prompt = positions.prompt - pad
    own = torch.arange(positions.past, positions.past + length) - pad  # position in the row
    real = own >= 0
    if chosen is None:
        return real.float()
    if (
        isinstance(chosen, slice)
        and (chosen.start or 0) >= 0
        and (chosen.stop is None or chosen.stop >= 0)
    ):
        step, stop = chosen.step or 1, chosen.stop if chosen.stop is not None else int(own[-1]) + 1
        start = chosen.start or 0
        hit = (own >= start) & (own < stop) & ((own - start) % step == 0)
        return (hit & real).float()
    if isinstance(chosen, Tensor) and (chosen.dtype == torch.bool or chosen.is_floating_point()):
        if chosen.numel() != prompt:
            raise InvalidInput(
                f"{place.name}: tokens is a mask of {chosen.numel()}, row {entry} has {prompt} "
                "tokens"
            )
        inside = real & (own < prompt)
        mask = torch.zeros(length)
        mask[inside] = chosen.detach().flatten().float().cpu()[own[inside]]
        return mask
    if isinstance(chosen, Box):
        raise InvalidInput(f"{place.name}: a Box needs image tokens, these are text")
    if isinstance(chosen, slice):
        wanted = list(range(*chosen.indices(prompt)))
    else:
        listed = [chosen] if isinstance(chosen, int) else [int(each) for each in chosen]
        wanted = [each + prompt if each < 0 else each for each in listed]
        if any(each < 0 for each in wanted):
            raise InvalidInput(f"{place.name}: tokens={chosen}, row {entry} has {prompt} tokens")
    return (torch.isin(own, torch.tensor(wanted, dtype=own.dtype)) & real).float()


def _indices(chosen: Any, length: int, place: Sequence_) -> list[int]:
    if isinstance(chosen, slice):
        return list(range(*chosen.indices(length)))
    listed = [chosen] if isinstance(chosen, int) else [int(each) for each in chosen]
    wrong = [each for each in listed if not -length <= each < length]
    if wrong:
        raise InvalidInput(f"{place.name}: token {wrong[0]} asked for, there are {length} tokens")
    return [each % length for each in listed]
