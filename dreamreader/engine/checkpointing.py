"""Gradient checkpointing: what is computed again in the backward pass has to be edited again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from dreamreader.engine.subject import Subject
from dreamreader.errors import InvalidInput

_FUNCTION = "_gradient_checkpointing_func"


@contextmanager
def refuse_late_recomputation(
    subject: Subject, modules: Iterable[nn.Module], tracker: Any
) -> Iterator[None]:
    """While this is open, edited parts that are checkpointed know that they need its hooks.

    Computed again after the block they would not be edited, and gradients would be wrong.

    Args:
        modules: of transformers or diffusers; those that checkpoint are found among them.
        tracker: says what was running, which is what runs again.

    Raises:
        InvalidInput: later, by the backward pass, where it runs after the block.
    """
    state = {"open": True}
    wrapped = []
    for module in modules:
        function = vars(module).get(_FUNCTION)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            vars(module)[_FUNCTION] = _guarded(function, subject, state, tracker)
            wrapped.append((module, function))
    try:
        yield
    finally:
        state["open"] = False
        for module, function in wrapped:
            vars(module)[_FUNCTION] = function


def _guarded(
    checkpoint: Callable[..., Any], subject: Subject, state: dict[str, bool], tracker: Any
) -> Callable[..., Any]:
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        edited = ran = False
        now, resumed = tracker.now, getattr(tracker, "resumed", None)

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal edited, ran
            if edited and not state["open"]:
                raise InvalidInput(
                    "gradient checkpointing computes an edited layer again, but the block of its "
                    "edits is over: call backward inside `with reader.editing(...)`"
                )
            before, again, ran = subject.edited, ran, True
            try:
                with resumed(now) if again and resumed else nullcontext():
                    return function(*args, **kwargs)
            finally:
                edited = edited or subject.edited > before

        return checkpoint(run, *args, **kwargs)

    return call
