"""A prediction with and without edits, carried as one tensor through a pipeline's guidance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput


class Twin(Tensor):
    """A prediction with the edits and one without; what is done to it is done to both.

    Its own values are the edited ones.
    """

    edited: Tensor
    plain: Tensor

    @classmethod
    def of(cls, edited: Tensor, plain: Tensor) -> "Twin":
        twin = edited.as_subclass(cls)
        twin.edited, twin.plain = edited, plain
        return twin

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("out", args[0] if args and _writes(func) else None)
        if target is not None and not isinstance(target, Twin):
            raise InvalidInput(
                f"the pipeline writes a prediction into a tensor in place ({_name(func)}), so the "
                "edited and the unedited one cannot be kept apart; asymmetric does not support it"
            )
        results = (func(*_one(args, side), **_one(kwargs, side)) for side in ("edited", "plain"))
        return _pair(*results, func=func)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Twin(edited={self.edited!r}, plain={self.plain!r})"


def _one(value: Any, side: str) -> Any:
    """Arguments of a call with one side of every twin."""
    if isinstance(value, Twin):
        return getattr(value, side)
    if isinstance(value, dict):
        return {key: _one(each, side) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_one(each, side) for each in value)
    return value


def _pair(edited: Any, plain: Any, func: Any) -> Any:
    if isinstance(edited, Tensor):
        return Twin.of(edited, plain)
    if isinstance(edited, tuple | list) and not isinstance(edited, torch.Size):
        pairs = zip(edited, plain, strict=True)
        return type(edited)([_pair(a, b, func) for a, b in pairs])
    if (edited == plain) is not True:
        raise InvalidInput(
            f"the pipeline reads a value of the prediction ({_name(func)}) that differs between "
            "the edited and the unedited one; asymmetric cannot follow both"
        )
    return edited


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _writes(func: Any) -> bool:
    name = _name(func)
    if name.startswith("__"):
        augmented = name.startswith("__i") and name not in ("__int__", "__index__", "__invert__")
        return augmented or name in ("__setitem__", "__set__")
    return name.endswith("_")
