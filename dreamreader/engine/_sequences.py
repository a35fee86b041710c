"""Which earlier call a call outside `generate` goes on with, by the cache that it is given."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader.engine._token_layout import TokenLayout
from dreamreader.errors import ClockUnknown

_KEPT = 8  # sequences that are remembered; a cache that outlives them is one that was filled before
_CACHES = ("past", "cache", "mems", "states", "kv")  # parts of the arguments' names
_NO_CACHES = ("encoder_", "cross_", "shared_", "padding_", "output_", "use_", "cache_position")


@dataclass(eq=False)
class Sequence:
    """Rows of tokens that one or several calls of a model have read.

    Attributes:
        run: its number among those of the session.
        total: tokens of each row so far, padding included.
        prompt: of these, those of the prompt, or why that is unknown.
        layout: of the latest call, or why it is unknown.
        ids: tokens of the prompt [rows, prompt], None where only embeddings were given.
        first: layout of the prompt, or why it is unknown.
        whole: all tokens or embeddings, where no cache keeps them; None elsewhere.
        source: what the encoder of an encoder-decoder reads beside it.
    """

    run: int
    rows: int
    total: int
    prompt: int | ClockUnknown
    layout: TokenLayout | ClockUnknown
    ids: Tensor | None
    first: TokenLayout | ClockUnknown
    whole: Tensor | None = None
    source: Tensor | None = None
    _cache: Any = None

    def keep(self, cache: Any) -> None:
        """Remember where its tokens are held, without holding them."""
        try:
            self._cache = weakref.ref(_handle(cache))
        except TypeError:  # an empty tuple or dictionary, or None: nothing to be known by
            self._cache = None

    def is_in(self, cache: Any) -> bool:
        """Whether this very cache holds its tokens."""
        return self._cache is not None and self._cache() is _handle(cache)


class Sequences:
    """The latest sequences of the calls outside `generate`."""

    def __init__(self) -> None:
        self._latest: list[Sequence] = []

    def clear(self) -> None:
        self._latest.clear()

    def of_cache(self, cache: Any) -> Sequence | None:
        """The sequence whose tokens this cache held when it was last seen."""
        return next((each for each in self._latest if each.is_in(cache)), None)

    def forget(self, cache: Any) -> None:
        """Someone else goes on with this cache."""
        self._latest = [each for each in self._latest if not each.is_in(cache)]

    def add(self, sequence: Sequence, instead_of: Sequence | None) -> None:
        kept = [each for each in self._latest if each is not instead_of][1 - _KEPT :]
        for each in kept:
            if each.whole is not None and each.whole.is_floating_point():
                each.whole = None  # embeddings are large: those of the latest call alone
        self._latest = [*kept, sequence]

    def find_grown(
        self, whole: Tensor, layout: TokenLayout | ClockUnknown, source: Tensor | None
    ) -> Sequence | None:
        """The sequence whose tokens these are with one more, as when decoding without a cache."""
        found = (each for each in reversed(self._latest) if _grows(each, whole, layout, source))
        return next(found, None)


def ends(layout: TokenLayout) -> tuple[int, ...]:
    """Own tokens of each sequence up to the end of this call."""
    if layout.real is None:
        return tuple(start + layout.length for start in layout.starts)
    came = layout.real.sum(1).tolist()
    return tuple(start + new for start, new in zip(layout.starts, came, strict=True))


def _grows(
    earlier: Sequence, whole: Tensor, layout: TokenLayout | ClockUnknown, source: Tensor | None
) -> bool:
    """Whether every row repeats its earlier tokens, with at most one behind them, some with one."""
    old = earlier.whole
    if old is None or len(old) != len(whole) or old.shape[2:] != whole.shape[2:]:
        return False
    if old.dtype != whole.dtype or old.device != whole.device:
        return False
    more = {
        now - was
        for was, now in zip(_counts(earlier.layout, old), _counts(layout, whole), strict=True)
    }
    if 1 not in more or more - {0, 1} or not _same(earlier.source, source):
        return False
    for row, (before, now) in enumerate(
        zip(_real(earlier.layout, old), _real(layout, whole), strict=True)
    ):
        was, came = old[row][before.to(old.device)], whole[row][now.to(whole.device)]
        if not torch.equal(was, came[: len(was)]):
            return False
    return True


def _counts(layout: TokenLayout | ClockUnknown, tokens: Tensor) -> tuple[int, ...]:
    return ends(layout) if isinstance(layout, TokenLayout) else (tokens.shape[1],) * len(tokens)


def _real(layout: TokenLayout | ClockUnknown, tokens: Tensor) -> Tensor:
    if isinstance(layout, TokenLayout) and layout.real is not None:
        return layout.real
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


# caches


@lru_cache(maxsize=1024)
def _names_cache(argument: str) -> bool:
    if argument.startswith(_NO_CACHES) or argument.endswith("hidden_states"):
        return False
    return argument == "state" or any(part in argument for part in _CACHES)


def caches_in(arguments: Mapping[str, Any]) -> list[Any]:
    """What a call is given of earlier ones, so that their tokens do not come again."""
    return [
        value
        for name, value in arguments.items()
        if value is not None
        and not isinstance(value, bool | int | float | str)
        and (_names_cache(name) or hasattr(value, "get_seq_length"))
        and not name.startswith("encoder_")
    ]


def cache_of(output: Any) -> Any:
    """The cache that a call hands out; None where there is none."""
    if isinstance(output, Mapping):
        return next(iter(caches_in(output)), None)
    if isinstance(output, tuple | list):
        held = (each for each in output if _count_in_cache(each, False) is not None)
        return next(held, None)
    return None


def count_held(caches: list[Any], of_decoder: bool) -> int | None:
    """Tokens that all these caches hold; None where they do not say, or say different numbers."""
    said = {held for each in caches if (held := _count_in_cache(each, of_decoder)) is not None}
    return said.pop() if len(said) == 1 else None


def _count_in_cache(cache: Any, of_decoder: bool) -> int | None:
    """Tokens that a cache of keys and values holds; None where it does not say."""
    length = getattr(cache, "get_seq_length", None)
    if length is not None:
        try:
            held = int(length())
        except (ValueError, TypeError, NotImplementedError):
            return None
        # One for decoders alone would count the encoder's tokens among its own.
        apart = hasattr(cache, "self_attention_cache")
        return None if of_decoder and held and not apart else held
    if isinstance(cache, tuple) and cache and isinstance(cache[0], tuple):
        pair = cache[0][:2]
        if all(isinstance(each, Tensor) and each.dim() == 4 for each in pair):
            return int(pair[0].shape[-2]) if pair[0].shape[-2] == pair[-1].shape[-2] else None
    return None


def _handle(cache: Any) -> Any:
    """What tells a cache from others: itself, or the first tensor of a tuple of them."""
    while isinstance(cache, tuple | list | dict) and cache:
        cache = next(iter(cache.values() if isinstance(cache, dict) else cache))
    return cache


def keeps_state(model: nn.Module, rows: int) -> bool:
    """Whether modules hold numbers of `rows` entries, or a cache, beside their parameters.

    A model that keeps its state so is given no cache, and a call of one token may go on with
    whatever was read before.
    """
    for module in model.modules():
        own = (*vars(module).items(), *module._buffers.items())
        if any(_is_state(each, rows) for name, each in own if name not in _OWN_OF_TORCH):
            return True
    return False


_OWN_OF_TORCH = frozenset(vars(nn.Module()))


def _is_state(value: Any, rows: int) -> bool:
    if isinstance(value, Tensor):
        numbers = value.is_floating_point() and not isinstance(value, nn.Parameter)
        return numbers and value.dim() > 1 and value.shape[0] == rows
    if isinstance(value, tuple | list):
        return any(_is_state(each, rows) for each in value)
    if isinstance(value, dict):
        return any(_is_state(each, rows) for each in value.values())
    return hasattr(value, "get_seq_length") and bool(_count_in_cache(value, False))
