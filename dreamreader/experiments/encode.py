"""Equal prompts of one batch go through the text encoders once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader.engine import Reader, Request, Watch

_GLOB = set("*?[")


@contextmanager
def encode_once(reader: Reader, requests: Sequence[Request] = ()) -> Iterator[None]:
    """Lets text encoders see each distinct row of tokens once, and repeats what they give.

    Left alone where a request reads or changes the text encoder, or looks for words in the prompt
    of each row.

    Args:
        reader: of a diffusers pipeline; anything without text encoders is left alone.
        requests: edits and recordings of the run.
    """
    with ExitStack() as stack:
        for name, module in getattr(reader.subject, "components", {}).items():
            if not name.startswith("text_encoder") or not isinstance(module, nn.Module):
                continue
            if any(_needs_rows(reader, each) for each in requests):
                continue
            shared = _DistinctRows()
            stack.callback(module.register_forward_pre_hook(shared.before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(shared.after).remove)
        yield


def _needs_rows(reader: Reader, request: Request) -> bool:
    if isinstance(request.tokens, str) or isinstance(request, Watch):
        return True
    return any(
        name.startswith("text_encoder")
        for site in request.sites
        for name in (reader.sites(site).names if _GLOB & set(site) else [site])
    )


class _DistinctRows:
    """Takes equal rows out before a call, and puts them back after it."""

    def __init__(self) -> None:
        self._rows = 0
        self._places: Tensor | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._places = None
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            return None
        mask = kwargs.get("attention_mask")
        keyed = ids if not isinstance(mask, Tensor) else torch.cat([ids, mask.to(ids)], 1)
        first: dict[tuple[int, ...], int] = {}
        order = [first.setdefault(tuple(row), len(first)) for row in keyed.tolist()]
        if len(first) == len(order):
            return None
        kept = torch.tensor([order.index(n) for n in range(len(first))], device=ids.device)
        self._rows = len(first)
        self._places = torch.tensor(order, device=ids.device)
        count = len(order)

        def choose_rows(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == count
            return value.index_select(0, kept) if batched else value

        return tuple(map(choose_rows, args)), {
            name: choose_rows(each) for name, each in kwargs.items()
        }

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        places, self._places = self._places, None
        return None if places is None else self._repeat(output, places)

    def _repeat(self, value: Any, places: Tensor) -> Any:
        if isinstance(value, Tensor):
            batched = value.dim() and value.shape[0] == self._rows
            return value.index_select(0, places) if batched else value
        if isinstance(value, tuple):
            return tuple(self._repeat(each, places) for each in value)
        if hasattr(value, "items"):
            return type(value)(**{k: self._repeat(each, places) for k, each in value.items()})
        return value
