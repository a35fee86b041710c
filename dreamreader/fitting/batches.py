"""Batches of a training: a function of the step, or of iterables that are read epoch by epoch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from dreamreader._hashing import class_of, hash_values
from dreamreader.errors import InvalidInput


@dataclass(frozen=True)
class ByStep:
    """Batches as a function of the step, counted from 0.

    Attributes:
        draw: gives the batch of a step, the same each time.
        of: what tells these batches from others; a training goes on with the same.
    """

    draw: Callable[[int], Any]
    of: Any = None


Batches = ByStep | Iterable[Any] | Callable[[int], Iterable[Any]]


class Stream(ABC):
    """Batches one by one, with a place from which they go on.

    Attributes:
        epoch: the epoch of the next batch. length: batches of an epoch, where that is known.
    """

    epoch: int = 0
    length: int | None = None

    @abstractmethod
    def take(self) -> tuple[Any] | None:
        """The next batch in a tuple, or None at the end of an epoch."""

    @abstractmethod
    def identity(self) -> Any: ...

    @property
    @abstractmethod
    def is_identified(self) -> bool:
        """Whether `identity` tells these data from others."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """Ends what reads ahead."""


def stream_of(batches: Batches) -> Stream:
    """A stream from its first batch.

    Raises:
        InvalidInput: they are no batches, or can be read only once.
    """
    if isinstance(batches, ByStep):
        return _Steps(batches)
    if not callable(batches):
        if not isinstance(batches, Iterable):
            raise InvalidInput(
                "fit: batches are an iterable, a function of the epoch, or ByStep(function of the "
                f"step), got {type(batches).__name__}"
            )
        if iter(batches) is batches:
            raise InvalidInput(
                "fit: these batches can be read only once; give a list, a dataset, or a function "
                "of the epoch"
            )
    return _Epochs(batches)


class _Steps(Stream):
    def __init__(self, batches: ByStep):
        self.batches, self.step = batches, 0

    def take(self) -> tuple[Any]:
        self.step += 1
        return (self.batches.draw(self.step - 1),)

    def identity(self) -> Any:
        return None if self.batches.of is None else hash_values(self.batches.of)

    @property
    def is_identified(self) -> bool:
        return self.batches.of is not None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


class _Epochs(Stream):
    """Epochs of an iterable. Without a `state_dict`, what was taken is read again and left out."""

    def __init__(self, batches: Any):
        self.batches = batches
        self.taken = 0  # batches of this epoch
        self._iterator: Iterator[Any] | None = None
        self._source: Any = None
        self._random = torch.get_rng_state()  # before the epoch, whose order may be drawn from it
        for epoch in (1, 0):  # another epoch than before is read from its start
            _set_epoch(batches, epoch)
        if not callable(batches):
            with suppress(TypeError):  # iterables need no length
                self.length = len(batches)

    def take(self) -> tuple[Any] | None:
        if self._iterator is None:
            self._iterator = iter(self._open())
        for batch in self._iterator:
            self.taken += 1
            return (batch,)
        if not self.taken:
            raise InvalidInput(f"fit: there are no batches in epoch {self.epoch}")
        self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None
        return None

    def identity(self) -> Any:
        own = getattr(self.batches, "identity", None)
        if callable(own):
            return {"batches": self.length, "of": own()}
        if isinstance(self.batches, list | tuple):
            return hash_values(self.batches)
        name = getattr(self.batches, "__qualname__", None) or class_of(self.batches)
        return {"batches": self.length, "of": name}

    @property
    def is_identified(self) -> bool:
        own = callable(getattr(self.batches, "identity", None))
        return own or isinstance(self.batches, list | tuple)

    def state_dict(self) -> dict[str, Any]:
        inner = None
        if self.taken and hasattr(self._source, "state_dict"):
            inner = self._source.state_dict()
        own = {"epoch": self.epoch, "taken": self.taken, "random": self._random}
        return own | {"source": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.close()
        self.epoch, self.taken = state["epoch"], state["taken"]
        if not self.taken:
            return
        torch.set_rng_state(state["random"])
        source: Any = self._open()
        if state["source"] is not None:
            source.load_state_dict(state["source"])
        self._iterator = iter(source)
        if state["source"] is None:
            for _ in range(self.taken):
                next(self._iterator, None)

    def close(self) -> None:
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        self._iterator = None

    def _open(self) -> Iterable[Any]:
        self._random = torch.get_rng_state()
        self._source = self.batches(self.epoch) if callable(self.batches) else self.batches
        _set_epoch(self._source, self.epoch)
        return self._source


def _set_epoch(source: Any, epoch: int) -> None:
    """Tells a dataset its epoch, inside a `DataLoader` too."""
    named: list[Any] = [source, getattr(source, "dataset", None)]
    for each in named:
        if hasattr(each, "set_epoch"):
            each.set_epoch(epoch)
