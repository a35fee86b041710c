"""Taps: where exactly a port of a module is read and written.

A tap names a module, the side of its call, and which part of the tensor there belongs to the port.
Families build taps; the session turns them into hooks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dreamreader.errors import InvalidInput


@dataclass(frozen=True)
class Channels:
    """Where the features of a port are among the features of the tensor that holds them.

    The last dimension is seen as `shape`; `index` takes one part, or a range of parts, of its axes
    in turn, and all of the axes behind. What is left, in order, are the features of the port, head
    by head.

    Args:
        shape: for example (heads, 3, d) where every head has its q, k and v side by side.
        index: for example (slice(None), 1): the second of the three parts of every head.
    """

    shape: tuple[int, ...]
    index: tuple[int | slice, ...]

    @property
    def total(self) -> int:
        """Features of the whole tensor."""
        return math.prod(self.shape)

    def of(self, x: Tensor) -> Tensor:
        """The part of x [..., total] as a view [..., *what is left of shape].

        Raises:
            InvalidInput: x has another number of features.
        """
        if x.shape[-1] != self.total:
            raise InvalidInput(
                f"the attention's fused projection gives {x.shape[-1]} features, "
                f"{' x '.join(map(str, self.shape))} = {self.total} were expected"
            )
        behind = (slice(None),) * (len(self.shape) - len(self.index))
        return x.unflatten(-1, self.shape)[(..., *self.index, *behind)]

    @property
    def axes(self) -> int:
        """Number of axes that `of` leaves."""
        return len(self.shape) - sum(isinstance(each, int) for each in self.index)


@dataclass(frozen=True, eq=False)
class Tap:
    """One place in the memory of a running model.

    Args:
        module: what is hooked.
        side: `out` (its result), `in` (an argument), `delta` (result minus argument), `probs`.
        element: which entry of a tuple result; None: the first tensor.
        argument: name of the argument of `in` and `delta`; None: the first one.
        channels: the features that belong to the port, in a fused projection; None: all.
        heads: number of heads of the port, None where it has none.
        axes: names of the tensor's dimensions where it has more than three.
        stream: `image` or `text`: only these tokens of a sequence that holds both.
    """

    module: nn.Module = field(repr=False)
    side: str = "out"
    element: int | None = None
    argument: str | None = None
    channels: Channels | None = None
    heads: int | None = None
    axes: tuple[str, ...] | None = None
    stream: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the port is the tensor as it is."""
        return self.channels is None


@dataclass(frozen=True, eq=False)
class AttentionFacts:
    """What a family knows of an attention module.

    Args:
        ports: tap of `q`, `k`, `v`, `heads`, and of their text stream as `q.text` and so on where
            the two streams have projections of their own.
        heads: number of heads; 0 where it is not known.
        no_probs: why attention probabilities do not exist here, None where they do.
        refused: why a port that one would look for here does not exist; the entry `""` holds for
            all that are not in `ports`.
        joint: the sequence inside holds text and image tokens.
        streams: entry of the module's result per stream, where it returns two.
    """

    ports: dict[str, Tap]
    heads: int
    no_probs: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    joint: bool = False
    streams: dict[str, int] = field(default_factory=dict)

    def why_not(self, port: str) -> str:
        """The reason why a port is missing; empty where none is known."""
        return self.refused.get(port, self.refused.get("", ""))


def pick(value: Any, element: int | None, name: str) -> Tensor:
    """The tensor of a result: itself, an entry of a tuple, or the first field of an object."""
    if isinstance(value, Tensor):
        return value
    items = _items(value)
    if items is not None:
        found = items[element] if element is not None and element < len(items) else None
        if element is None:
            found = next((each for each in items if isinstance(each, Tensor)), None)
        if isinstance(found, Tensor):
            return found
    raise InvalidInput(
        f"{name}: the module gives {type(value).__name__}, which holds no tensor to read"
    )


def put(value: Any, element: int | None, new: Tensor) -> Any:
    """`value` with the tensor that `pick` found replaced; containers are rebuilt, never changed."""
    if isinstance(value, Tensor):
        return new
    items = list(_items(value) or ())
    if element is None:
        element = next(number for number, each in enumerate(items) if isinstance(each, Tensor))
    if isinstance(value, dict):
        key = list(value)[element]
        return type(value)(**{**value, key: new})
    items[element] = new
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _items(value: Any) -> Sequence[Any] | None:
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, dict):  # ModelOutput and BaseOutput are ordered dictionaries
        return list(value.values())
    return None


class Argument:
    """Finds and replaces one argument of a module's call, wherever the caller put it."""

    def __init__(self, module: nn.Module, name: str | None):
        import inspect

        parameters = [
            each.name
            for each in inspect.signature(type(module).forward).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ][1:]
        if name is not None and name not in parameters:
            raise InvalidInput(f"{type(module).__name__}.forward has no argument {name!r}")
        self.name = name or (parameters[0] if parameters else "input")
        self.position = parameters.index(self.name) if self.name in parameters else 0

    def get(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None

    def replace(
        self, args: tuple, kwargs: dict[str, Any], new: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        if self.name in kwargs:
            return args, {**kwargs, self.name: new}
        return (*args[: self.position], new, *args[self.position + 1 :]), kwargs


def read_channels(x: Tensor, tap: Tap) -> Tensor:
    """The features of x [B, T, D] that belong to the tap: a view where its memory allows one."""
    if tap.channels is None:
        return x
    part = tap.channels.of(x)
    return part.flatten(-tap.channels.axes) if tap.channels.axes > 1 else part


def write_channels(x: Tensor, tap: Tap, part: Tensor) -> Tensor:
    """`x` with the features of the tap replaced by `part`."""
    if tap.channels is None:
        return part.reshape(x.shape)
    full = x.clone()
    target = tap.channels.of(full)
    target.copy_(part.reshape(target.shape))
    return full
