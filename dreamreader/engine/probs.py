"""Attention probabilities, recomputed from the queries and keys that an attention really uses.

While such a site is recorded, a torch function mode sees the fused attention call inside the module
and forms softmax(q k' scale + mask) from its arguments, tile by tile, so that norms, rotations,
joint streams, masks and grouped heads are those of the model. Attention that forms the
probabilities itself (sliced, eager) is read where it does. Processors are never replaced.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dreamreader.errors import InvalidInput

_SOFTMAX = {torch.softmax, F.softmax, torch.Tensor.softmax, torch.nn.functional.softmax}
_TILE = 2**22  # scores held at once


class ProbsMode(TorchFunctionMode):
    """Collects probabilities between `begin` and `end` of an attention module."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []

    def begin(self, module: nn.Module) -> None:
        """The module starts."""
        self._open.append((module, [], []))

    def end(self, name: str, heads: int) -> Tensor:
        """The module is done: [batch, heads, queries, keys] in float32 or the model's dtype.

        Raises:
            InvalidInput: its attention went through no call that shows queries and keys.
        """
        _, fused, formed = self._open.pop()
        if len(fused) == 1:
            return fused[0]
        if not fused and formed:
            whole = torch.cat(formed) if len(formed) > 1 else formed[0]
            return whole if whole.dim() == 4 else whole.unflatten(0, (-1, heads))
        if fused:
            raise InvalidInput(
                f"{name}: {len(fused)} attentions ran inside the module, probs needs one"
            )
        raise InvalidInput(
            f"{name}: its attention shows no queries and keys (a special kernel?); choose torch's "
            "own attention, for example model.set_attention_backend('native')"
        )

    def drop(self) -> None:
        """The module did not compute: what was collected is let go."""
        self._open.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._open:
            return func(*args, **kwargs)
        _, fused, formed = self._open[-1]
        if func is F.scaled_dot_product_attention:
            fused.append(probabilities(*args, **kwargs))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX and isinstance(result, Tensor) and result.dim() in (3, 4):
            formed.append(result.detach())
        return result


@torch.no_grad()
def probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k' scale + mask) of one attention call, in tiles over the queries.

    Args:
        query: [batch, heads, queries, d]. key: [batch, key heads, keys, d].
        attn_mask: bool (True takes part) or added to the scores.

    Returns:
        [batch, heads, queries, keys] in the dtype of the query, computed in float32.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    out = torch.empty(batch, heads, queries, keys, dtype=query.dtype, device=query.device)
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    step = max(1, _TILE // max(1, batch * heads * keys))
    transposed = key.to(work).transpose(-1, -2)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, queries, keys)
    for start in range(0, queries, step):
        tile = slice(start, min(start + step, queries))
        scores = query[:, :, tile].to(work) @ transposed * scale
        if is_causal:
            at = torch.arange(tile.start, tile.stop, device=query.device)[:, None]
            scores.masked_fill_(torch.arange(keys, device=query.device) > at, -torch.inf)
        if attn_mask is not None:
            part = attn_mask[:, :, tile]
            if part.dtype == torch.bool:
                scores.masked_fill_(~part, -torch.inf)
            else:
                scores += part
        # A row without any key (padding) has no distribution: zeros, as fused kernels give.
        empty = scores.isneginf().all(-1, keepdim=True)
        out[:, :, tile] = torch.where(empty, 0, torch.softmax(scores, -1))
    return out
