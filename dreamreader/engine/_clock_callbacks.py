"""Marking the time that a pipeline spends in a caller's callbacks."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class CallbackListener(Protocol):
    """What wants to know that a callback of the caller runs."""

    def callback_began(self) -> None:
        """The pipeline calls a function that its caller gave it."""

    def callback_ended(self) -> None:
        """That function returned, or left with an exception."""


def with_marks(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    listeners: Sequence[CallbackListener],
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a pipeline's call, with every callback among them telling the listeners."""

    def mark(name: str, value: Any) -> Any:
        if "callback" not in name or not callable(value):
            return value
        return _mark(value, lambda: _tell(listeners))

    names = list(inspect.signature(function).parameters)[1 : len(args) + 1]
    names += [""] * (len(args) - len(names))
    placed = [mark(name, value) for name, value in zip(names, args, strict=True)]
    return placed, {name: mark(name, value) for name, value in kwargs.items()}


@contextmanager
def _tell(listeners: Sequence[CallbackListener]) -> Iterator[None]:
    for listener in listeners:
        listener.callback_began()
    try:
        yield
    finally:
        for listener in listeners:
            listener.callback_ended()


def _mark(callback: Any, aside: Callable[[], AbstractContextManager[None]]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with aside():
            return callback(*args, **kwargs)

    if not hasattr(callback, "tensor_inputs"):
        return functools.update_wrapper(call, callback)
    # pipelines ask diffusers' own callbacks for their class and attributes
    twin = copy.copy(callback)
    own = type(callback)
    body = {"__call__": lambda self, *args, **kwargs: call(*args, **kwargs)}
    object.__setattr__(twin, "__class__", type(own.__name__, (own,), body))
    return twin
