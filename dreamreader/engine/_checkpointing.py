"""Gradient checkpointing: what is computed again in the backward pass has to be edited again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dreamreader.engine._session_state import SessionState
from dreamreader.errors import InvalidInput

_FUNCTION = "_gradient_checkpointing_func"


@contextmanager
def recompute_as_before(shared: SessionState, modules: Iterable[nn.Module]) -> Iterator[None]:
    """While this is open, parts that are computed again are edited as they were, and not recorded.

    The backward pass runs outside every forward: what was running is remembered. Computed again
    after the block parts would not be edited, and gradients would be wrong.

    Args:
        modules: of transformers or diffusers; those that checkpoint are found among them.

    Raises:
        InvalidInput: later, by the backward pass, where it runs after the block.
    """
    state = {"open": True}
    wrapped = []
    for module in modules:
        function = vars(module).get(_FUNCTION)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            vars(module)[_FUNCTION] = _guard(function, shared, state)
            wrapped.append((module, function))
    try:
        yield
    finally:
        state["open"] = False
        for module, function in wrapped:
            vars(module)[_FUNCTION] = function


def _guard(
    checkpoint: Callable[..., Any], shared: SessionState, state: dict[str, bool]
) -> Callable[..., Any]:
    subject = shared.subject

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        edited = begun = False
        now = shared.tracker.now

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal edited, begun
            if edited and not state["open"]:
                raise InvalidInput(
                    "gradient checkpointing computes an edited layer again, but the block of its "
                    "edits is over: call backward inside `with reader.editing(...)`"
                )
            before, rehearsing, again = subject.edited, subject.rehearsing, shared.again
            if begun and state["open"]:
                subject.rehearsing, shared.again = True, now
            begun = True
            try:
                return function(*args, **kwargs)
            finally:
                subject.rehearsing, shared.again = rehearsing, again
                edited = edited or subject.edited > before

        return checkpoint(run, *args, **kwargs)

    return call
