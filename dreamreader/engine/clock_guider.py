"""Which pass of a guider a denoiser call is.

Pipelines with a guider (the modular ones) let it split their inputs into passes, which carry names
such as `pred_cond`, and announce each to it before they call the denoiser.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dreamreader.errors import ClockUnknown

_SPLITS = ("prepare_inputs", "prepare_inputs_from_block_state")


class Passes:
    """The passes that a guider prepared last."""

    def __init__(self, guider: Any):
        self.guider = guider
        self.prepared: list[Any] = []

    def running(self, embedding: Any) -> str:
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


@contextmanager
def listen_to_guider(guider: Any) -> Iterator[Passes | None]:
    """Learn the passes that this guider prepares; None where there is no guider."""
    if not all(callable(getattr(guider, name, None)) for name in _SPLITS):
        yield None
        return
    passes, shelf = Passes(guider), vars(guider)
    earlier = {name: shelf[name] for name in _SPLITS if name in shelf}
    for name in _SPLITS:
        shelf[name] = _kept(getattr(guider, name), passes)
    try:
        yield passes
    finally:
        for name in _SPLITS:
            shelf.pop(name, None)
        shelf.update(earlier)


def _kept(split: Any, passes: Passes) -> Any:
    @functools.wraps(split)
    def listening(*args: Any, **kwargs: Any) -> Any:
        passes.prepared = split(*args, **kwargs)
        return passes.prepared

    return listening
