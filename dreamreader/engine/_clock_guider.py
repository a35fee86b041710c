"""Which pass of a guider a denoiser call is.

Pipelines with a guider (the modular ones) let it split their inputs into passes, which carry names
such as `pred_cond`, and announce each to it before they call the denoiser.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dreamreader.errors import ClockUnknown

_SPLITS = ("prepare_inputs", "prepare_inputs_from_block_state")


class Passes:
    """The passes that a guider prepared last."""

    def __init__(self, guider: Any):
        self.guider = guider
        self.prepared: list[Any] = []

    def find_running(self, embedding: Any) -> str:
        """Name of the pass that the pipeline announced last.

        Raises:
            ClockUnknown: none was announced, or the call has the embeddings of another one.
        """
        turn = int(getattr(self.guider, "_count_prepared", 0)) - 1
        if not 0 <= turn < len(self.prepared):
            raise ClockUnknown(
                f"the pipeline did not tell its {type(self.guider).__name__} which pass it runs"
            )
        holders = [each for each in self.prepared if _holds(each, embedding)]
        if holders and self.prepared[turn] not in holders:
            raise ClockUnknown(
                f"the pipeline announced pass {turn + 1} to its {type(self.guider).__name__}, but "
                "called the denoiser with the prompt embeddings of another one"
            )
        return str(getattr(self.prepared[turn], self.guider._identifier_key))


def _holds(prepared: Any, embedding: Any) -> bool:
    return embedding is not None and any(each is embedding for each in vars(prepared).values())


class _GuiderTap:
    """Stands for one of a guider's methods and passes on what it prepares."""

    def __init__(self, original: Callable[..., Any], earlier: Any):
        self.original = original
        self.earlier = earlier  # what the object itself had there, beside its class
        self.listening: list[Passes] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prepared = self.original(*args, **kwargs)
        for passes in self.listening:
            passes.prepared = prepared
        return prepared


@contextmanager
def listen_to_guider(guider: Any) -> Iterator[Passes | None]:
    """Learn the passes that this guider prepares; None where there is no guider."""
    if not all(callable(getattr(guider, name, None)) for name in _SPLITS):
        yield None
        return
    passes, shelf = Passes(guider), vars(guider)
    for name in _SPLITS:
        if not isinstance(shelf.get(name), _GuiderTap):
            shelf[name] = _GuiderTap(getattr(guider, name), shelf.get(name))
        shelf[name].listening.append(passes)
    try:
        yield passes
    finally:
        for name in _SPLITS:
            tap = shelf.get(name)
            if isinstance(tap, _GuiderTap):
                _leave(shelf, name, tap, passes)


def _leave(shelf: dict[str, Any], name: str, tap: _GuiderTap, passes: Passes) -> None:
    tap.listening = [each for each in tap.listening if each is not passes]
    if not tap.listening:
        del shelf[name]
        if tap.earlier is not None:
            shelf[name] = tap.earlier
