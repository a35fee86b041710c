"""Applying a plain function at a site: to the rows that are selected, with its result checked."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dreamreader.engine._edit_context import EditContext
from dreamreader.errors import InvalidInput


def apply_function(fn: Callable[..., Any], x: Tensor, place: EditContext, label: str) -> Tensor:
    """x [batch, tokens, features] with fn applied to its selected rows.

    Args:
        fn: fn(part) or fn(part, place), where part is a copy [rows, tokens, features] or, at sites
            with heads, [rows, tokens, heads, d_head]; gives the same shape and dtype, or None for
            no change.

    Raises:
        InvalidInput: fn gave something else.
    """
    on = (place.selected != 0).any(1).expand(x.shape[0])
    entries = on.nonzero().flatten().to(x.device)
    part = x[entries] if len(entries) < x.shape[0] else x.clone()
    if place.heads:
        part = part.unflatten(-1, (place.heads, -1))
    new = fn(part, place) if _takes_place(fn) else fn(part)
    if new is None:
        return x
    if not isinstance(new, Tensor) or new.shape != part.shape or new.dtype != part.dtype:
        got = f"{new.dtype} {list(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise InvalidInput(
            f"{label} at {place.site}: fn gave {got}, {part.dtype} {list(part.shape)} is needed"
        )
    if place.heads:
        new = new.flatten(-2)
    return new if len(entries) == x.shape[0] else x.index_copy(0, entries, new)


def _takes_place(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False
    return (
        sum(
            each.kind <= each.POSITIONAL_OR_KEYWORD and each.default is each.empty
            for each in parameters
        )
        >= 2
    )
