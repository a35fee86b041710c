"""The attention that a module really computes: kept as queries and keys, formed only on request.

While a site with the port `probs` is read, a torch function mode sees the fused attention call
inside the module, so that norms, rotations, joint streams, masks and grouped heads are those of
the model. Of an attention that forms the probabilities itself (sliced, eager) they are what comes
of a softmax and multiplies the values, so a softmax of something else, or a column that is cut off
before (an attention sink), is none of them. Processors are never replaced.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from dreamreader.errors import InvalidInput

_SOFTMAX = {torch.softmax, F.softmax, torch.Tensor.softmax, torch.special.softmax}
_DROPOUT = {F.dropout, torch.dropout}
_PRODUCT = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
_SCORES = _PRODUCT | {torch.baddbmm, torch.Tensor.baddbmm, torch.einsum}
_OTHER_LAYERS = {F.linear, F.layer_norm, F.rms_norm, F.conv1d, F.conv2d}  # no scores behind these
# What may happen to probabilities before they multiply the values.
_KEEPING = {
    getattr(torch.Tensor, name)
    for name in (
        "to type type_as float double half bfloat16 contiguous clone detach view reshape flatten "
        "unflatten squeeze unsqueeze expand narrow __getitem__ masked_fill "
        "masked_fill_ mul __mul__ __rmul__ __imul__ nan_to_num"
    ).split()
} | {torch.mul, torch.nan_to_num, torch.masked_fill, torch.where, torch.reshape, torch.flatten}
_TILE = 2**22  # scores held at once


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a running model, p = softmax(q k' scale + mask) in every head.

    Attributes:
        shape: (batch, heads, queries, keys).
        dtype, device: of the model's own values.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def is_start(self) -> bool:
        """Whether it is the whole attention, or the first of the shares that the model forms."""
        return True

    def outline(self) -> Float[Tensor, "batch queries heads keys"]:
        """A tensor of the shape, dtype and device of the probabilities, without their memory."""
        batch, heads, queries, keys = self.shape
        one = torch.empty((), dtype=self.dtype, device=self.device)
        return one.expand(batch, queries, heads, keys)

    def probabilities(self) -> Float[Tensor, "batch heads queries keys"]:
        """All of them: as much memory as heads x queries x keys."""
        raise NotImplementedError

    def words_(
        self,
        out: Float[Tensor, "batch heads words queries"],
        weights: Float[Tensor, "batch words keys"],
        queries: slice = slice(None),
    ) -> None:
        """Add to `out` the attention that goes to weighted keys; probabilities are never formed.

        out[b, h, w, q] += sum_k weights[b, w, k] p[b, h, q, k]

        Args:
            out: float32 (float64 where the model is), with as many queries as `queries` selects.
            weights: in the dtype of `out`; the first axis may be 1.
            queries: a range of the queries, such as the image tokens of a joint sequence.
        """
        raise NotImplementedError

    def of(self, entries: Sequence[int]) -> "Attention":
        """The attention of these batch entries only, in this order."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class FusedAttention(Attention):
    """The arguments of one fused attention call.

    Attributes:
        query: [batch, heads, queries, d]. key: [batch, key heads, keys, d].
        mask: [batch or 1, heads or 1, queries or 1, keys or 1]; bool (True takes part) or added.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @torch.no_grad()
    def probabilities(self) -> Float[Tensor, "batch heads queries keys"]:
        """In the dtype of the query, computed in float32, in tiles over the queries."""
        batch, heads, queries, keys = self.shape
        key = self.key.repeat_interleave(heads // self.key.shape[1], dim=1)
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        step = max(1, _TILE // max(1, batch * heads * keys))
        transposed = key.to(work).transpose(-1, -2)
        for start in range(0, queries, step):
            tile = slice(start, min(start + step, queries))
            scores = self.query[:, :, tile].to(work) @ transposed * self.scale
            mask = self._mask(tile)
            if mask is not None and mask.dtype == torch.bool:
                scores.masked_fill_(~mask, -torch.inf)
            elif mask is not None:
                scores += mask
            # A row without any key (padding) has no distribution: zeros, as fused kernels give.
            empty = scores.isneginf().all(-1, keepdim=True)
            out[:, :, tile] = torch.where(empty, 0, torch.softmax(scores, -1))
        return out

    def words_(
        self,
        out: Float[Tensor, "batch heads words queries"],
        weights: Float[Tensor, "batch words keys"],
        queries: slice = slice(None),
    ) -> None:
        from dreamreader.ops import attention_words_

        first, last, _ = queries.indices(self.shape[2])
        query = self.query[:, :, first:last]
        # The kernel's own causality counts from query 0.
        causal = self.causal and first == 0
        mask = self._mask(slice(first, last), causal=not causal)
        attention_words_(out, query, self.key, weights, mask=mask, causal=causal, scale=self.scale)

    def of(self, entries: Sequence[int]) -> "FusedAttention":
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = _choose(mask, entries)
        query, key = _choose(self.query, entries), _choose(self.key, entries)
        shape = (len(entries), *self.shape[1:])
        return FusedAttention(
            shape, self.dtype, self.device, query, key, mask, self.causal, self.scale
        )

    def _mask(self, tile: slice, causal: bool = True) -> Tensor | None:
        """The mask of a range of queries, with the causal one in it where that is asked for."""
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, tile]
        if not (self.causal and causal):
            return mask
        at = torch.arange(tile.start, tile.stop, device=self.device)[:, None]
        past = torch.arange(self.shape[3], device=self.device) <= at
        if mask is None:
            return past[None, None]
        return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)


@dataclass(frozen=True, eq=False)
class FormedAttention(Attention):
    """Probabilities that the model formed itself: of all heads, or a share of them.

    Attributes:
        part: [n, queries, keys]: the heads `first` .. `first + n - 1` of batch * heads.
        entries: the batch entries that count, by their number in the call.
    """

    part: Tensor
    first: int
    entries: tuple[int, ...]

    @property
    def is_start(self) -> bool:
        return self.first == 0

    def probabilities(self) -> Float[Tensor, "batch heads queries keys"]:
        heads = self.shape[1]
        if self.first or len(self.part) % heads or len(self.part) // heads <= max(self.entries):
            raise InvalidInput(
                "the model forms its attention in shares (attention slicing), so there is no "
                "tensor of all heads: use words_, or switch slicing off"
            )
        return _choose(self.part.unflatten(0, (-1, heads)), self.entries)

    def words_(
        self,
        out: Float[Tensor, "batch heads words queries"],
        weights: Float[Tensor, "batch words keys"],
        queries: slice = slice(None),
    ) -> None:
        heads = self.shape[1]
        for place, entry in enumerate(self.entries):
            start = entry * heads
            low = max(start, self.first)
            high = min(start + heads, self.first + len(self.part))
            if low >= high:
                continue
            wanted = weights[place if len(weights) > 1 else 0]  # [words, keys]
            used = (wanted != 0).any(0).nonzero().flatten()
            part = self.part[low - self.first : high - self.first, queries].index_select(2, used)
            share = wanted[:, used] @ part.to(out.dtype).transpose(1, 2)  # [heads, words, queries]
            out[place, low - start : high - start] += share

    def of(self, entries: Sequence[int]) -> "FormedAttention":
        kept = tuple(self.entries[each] for each in entries)
        shape = (len(kept), *self.shape[1:])
        return FormedAttention(shape, self.dtype, self.device, self.part, self.first, kept)


@dataclass(eq=False)
class _Open:
    """An attention module at work, and what was seen of it.

    `shares` gets what the model forms itself, piece by piece; without it the pieces are kept.
    `scores` holds products and what is made of them, `weights` what comes of a softmax of scores,
    with the values that it had before dropout.
    """

    name: str
    heads: int
    batch: int
    shares: Callable[[Attention], None] | None
    fused: list[FusedAttention] = field(default_factory=list)
    formed: list[Tensor] = field(default_factory=list)
    done: int = 0
    mixed: bool = False
    scores: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    weights: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def follow(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Watch one call: from a product of queries and keys to what multiplies the values."""
        if not isinstance(result, Tensor):
            return
        given = _tensors((*args, *kwargs.values()))
        come = [each for each in given if each in self.weights]
        if func in _SOFTMAX:
            last = _axis(args, kwargs) in (-1, result.dim() - 1)
            if last and result.dim() in (3, 4) and given and given[0] in self.scores:
                self.weights[result] = None
        elif func in _SCORES:
            self._multiply(func, args, given, come, result)
        elif come and func in _DROPOUT:
            before = self.weights[come[0]]
            self.weights[result] = come[0] if before is None else before
        elif come and func in _KEEPING:
            self.weights[result] = None
        elif func not in _OTHER_LAYERS and any(each in self.scores for each in given):
            self.scores[result] = None

    def _multiply(
        self, func: Any, args: tuple, given: list[Tensor], come: list[Tensor], result: Tensor
    ) -> None:
        if not come:
            self.scores[result] = None
            return
        simple = func in _PRODUCT or (func is torch.einsum and _is_product(args))
        if simple and come == given[:1] and come[0].dim() > 2:
            before = self.weights[come[0]]
            self.form((come[0] if before is None else before).detach())
        else:
            self.mixed = True

    def form(self, part: Tensor) -> None:
        """What multiplies values: [batch, heads, queries, keys], or a share [n, queries, keys]."""
        if part.dim() == 4:
            if tuple(part.shape[:2]) != (self.batch, self.heads):
                raise self._other(f"{list(part.shape[:2])} maps of probabilities")
            part = part.flatten(0, 1)
        self.done += len(part)
        if self.done > self.batch * self.heads:
            raise self._unequal()
        if self.shares is None:
            self.formed.append(part)
        else:
            self.shares(self._share(part, self.done - len(part)))

    def _share(self, part: Tensor, first: int) -> FormedAttention:
        shape = (self.batch, self.heads, part.shape[1], part.shape[2])
        entries = tuple(range(self.batch))
        return FormedAttention(shape, part.dtype, part.device, part, first, entries)

    def close(self) -> Attention | None:
        """The one attention that ran; None where `shares` had all of it."""
        if len(self.fused) + bool(self.done) > 1:
            count = len(self.fused) + bool(self.done)
            raise InvalidInput(
                f"{self.name}: {count} attentions ran inside the module, probs needs one"
            )
        if self.mixed:
            raise self._other("attentions that are multiplied with each other")
        if self.fused:
            found = self.fused[0]
            if found.shape[:2] != (self.batch, self.heads):
                raise self._other(f"an attention of {list(found.shape[:2])}")
            return found
        if not self.done:
            raise InvalidInput(
                f"{self.name}: its attention shows no queries and keys (a special kernel, or no "
                "softmax?); choose one that torch computes: attn_implementation='sdpa' or 'eager' "
                "in transformers, model.set_attention_backend('native') in diffusers"
            )
        if self.done != self.batch * self.heads:
            raise self._unequal()
        if self.shares is not None:
            return None
        if len({each.shape[1:] for each in self.formed}) > 1:
            raise self._other("several attentions of different sizes")
        whole = torch.cat(self.formed) if len(self.formed) > 1 else self.formed[0]
        return self._share(whole, 0)

    def _other(self, what: str) -> InvalidInput:
        return InvalidInput(
            f"{self.name}: {what} ran inside the module where {self.batch} batch entries x "
            f"{self.heads} heads were expected, so its heads are not known"
        )

    def _unequal(self) -> InvalidInput:
        return InvalidInput(
            f"{self.name}: {self.done} maps of probabilities are formed inside the module, "
            f"{self.batch * self.heads} were expected (batch x heads), so their heads are not known"
        )


class ProbsMode(TorchFunctionMode):
    """Sees the attentions that run between `begin` and `end` of an attention module."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[_Open] = []

    def begin(
        self, name: str, heads: int, batch: int, shares: Callable[[Attention], None] | None = None
    ) -> None:
        """The module of a site starts.

        Args:
            heads, batch: what the module works on.
            shares: called at once with every piece of attention that the model forms itself; else
                the pieces are kept until `end`.
        """
        self._open.append(_Open(name, heads, batch, shares))

    def end(self) -> Attention | None:
        """The module is done: its attention; None where `shares` had all of it.

        Raises:
            InvalidInput: its attention went through no call that shows queries and keys, several
                ran, or it has other heads than the module states.
        """
        return self._open.pop().close()

    def drop(self) -> None:
        """The module did not compute: what was collected is let go."""
        self._open.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._open:
            return func(*args, **kwargs)
        work = self._open[-1]
        if func is F.scaled_dot_product_attention:
            work.fused.append(_bind_fused(work.heads, *args, **kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        work.follow(func, args, kwargs, result)
        return result


def _is_product(args: tuple) -> bool:
    """Whether an einsum call is a product of matrices, as "bhij,bhjd->bhid"."""
    left, _, rest = str(args[0]).replace(" ", "").partition(",")
    right, _, out = rest.partition("->")
    both = left[:-2] == right[:-2] == out[:-2] and len(args) == 3
    return both and left[-1:] == right[-2:-1] and out[-2:] == left[-2:-1] + right[-1:]


def _tensors(values: tuple) -> list[Tensor]:
    """Tensors among the arguments of a call, those in a list included."""
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            found += [one for one in each if isinstance(one, Tensor)]
    return found


def _axis(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """The dimension of a softmax call."""
    return kwargs.get("dim", args[1] if len(args) > 1 else None)


def _bind_fused(
    count: int,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedAttention:
    """What one call of torch's fused attention computes; arguments as there, `count` heads."""
    if query.dim() == 3 and len(query) % count == 0:  # heads folded into the batch
        query, key = (each.unflatten(0, (-1, count)) for each in (query, key))
        if attn_mask is not None and attn_mask.dim() == 3 and len(attn_mask) > 1:
            attn_mask = attn_mask.unflatten(0, (-1, count))
    if query.dim() != 4:
        raise InvalidInput(
            f"the queries of its attention are {list(query.shape)}, "
            f"[batch, {count} heads, queries, d] was expected"
        )
    batch, heads, queries, width = query.shape
    mask = None if attn_mask is None else attn_mask.detach()
    return FusedAttention(
        (batch, heads, queries, key.shape[2]),
        query.dtype,
        query.device,
        query.detach(),
        key.detach(),
        None if mask is None else mask[(None,) * (4 - mask.dim())],
        is_causal,
        1 / math.sqrt(width) if scale is None else scale,
    )


def _choose(x: Tensor, entries: Sequence[int]) -> Tensor:
    """Entries of the first axis: a view where they follow each other."""
    first = entries[0]
    if list(entries) == list(range(first, first + len(entries))):
        return x[first : first + len(entries)]
    return x[torch.tensor(entries, device=x.device)]


def entries_of(args: tuple, kwargs: dict[str, Any]) -> int:
    """Batch entries of a module's call: those of its first tensor."""
    given = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
    first = next(given, None)
    return first.shape[0] if first is not None and first.dim() else 1


__all__ = ["Attention", "FormedAttention", "FusedAttention", "ProbsMode", "entries_of"]
