"""Hashes of values by what they hold: tensors, modules, and plain values that hold them."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def bytes_of(tensor: Tensor) -> bytes:
    """The values of a tensor, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, those too that are not saved with it."""
    held = {**dict(module.named_buffers(remove_duplicate=False)), **module.state_dict()}
    return {key: held[key] for key in sorted(held) if isinstance(held[key], Tensor)}


def hash_tensors(tensors: Mapping[str, Tensor], digest: Any) -> None:
    """Adds name, dtype, shape and values of tensors to a digest."""
    for key, tensor in tensors.items():
        digest.update(f"{key}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(bytes_of(tensor))


def class_of(thing: Any) -> str:
    """Module and name of a class of which something is."""
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def hash_values(value: Any) -> str:
    """SHA-256 of a value by what it holds, however deep.

    Args:
        value: plain values, tensors, arrays, modules, and collections, dataclasses and objects of
            them. What an object's `identity()` gives stands for the object.

    Returns:
        64 hexadecimal digits; equal for equal values, on every machine.

    Example:
        >>> hash_values({"a": [1, 2]}) == hash_values({"a": (1, 2)})
        True
    """
    digest = hashlib.sha256()
    for part in _parts(value, ()):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any, above: tuple[int, ...]) -> Iterator[bytes]:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        yield f"{type(value).__name__}:{value!r};".encode()
        return
    if isinstance(value, Tensor | np.ndarray | np.generic):
        tensor = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value)
        yield f"tensor:{tensor.dtype}:{list(tensor.shape)};".encode()
        yield bytes_of(tensor)
        return
    if id(value) in above:
        yield f"again:{above.index(id(value))};".encode()
        return
    name, inner = _inner(value)
    yield f"{name}(".encode()
    for each in inner:
        yield from _parts(each, (*above, id(value)))
    yield b")"


def _inner(value: Any) -> tuple[str, Iterator[Any]]:
    """The kind of a value, and the values that it is made of."""
    if isinstance(value, nn.Module):
        return class_of(value), iter([each for pair in tensors_of(value).items() for each in pair])
    if isinstance(value, Mapping):
        return "mapping", iter([each for pair in value.items() for each in pair])
    if isinstance(value, Set):
        return "set", iter(sorted(value, key=repr))
    if isinstance(value, Sequence):
        return "list", iter(value)
    if callable(getattr(value, "identity", None)):
        return class_of(value), iter([value.identity()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return class_of(value), iter(
            [getattr(value, field.name) for field in dataclasses.fields(value)]
        )
    if hasattr(value, "__qualname__"):  # a function or class
        return f"{value.__module__}.{value.__qualname__}", iter(())
    if hasattr(value, "__dict__"):
        return class_of(value), iter([each for pair in vars(value).items() for each in pair])
    shown = repr(value)
    return class_of(value), iter([] if " at 0x" in shown else [shown])
