"""Edits in a safetensors file: tensors as tensors, everything else as JSON in its metadata."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from dreamreader._tensor_files import load_described, save_described
from dreamreader.edits.ablate import Ablate
from dreamreader.edits.loreft import LoReFT
from dreamreader.edits.mlp import Mlp
from dreamreader.edits.patch import Patch
from dreamreader.edits.probe_guidance import ProbeGuidance
from dreamreader.edits.simple import Clamp, Scale
from dreamreader.edits.steer import Steer
from dreamreader.engine import Activation, Box, Cache, EditRequest, Row, StepInfo
from dreamreader.errors import InvalidInput, UnknownName

_KIND = "edits"
_KINDS: dict[str, type[EditRequest]] = {
    each.__name__: each for each in (Steer, Ablate, Scale, Clamp, Patch, LoReFT, ProbeGuidance)
}


def save(path: str | os.PathLike[str], edits: EditRequest | Sequence[EditRequest]) -> None:
    """Writes edits to a file that `load` reads back equal.

    Args:
        path: of the file, usually with the ending .safetensors.
        edits: one edit or several; the order is kept.

    Raises:
        InvalidInput: an edit holds a function (a predicate, or `Edit`), which no file can hold.
    """
    listed = [edits] if isinstance(edits, EditRequest) else list(edits)
    tensors: dict[str, Tensor] = {}
    found = [_packed_edit(each, tensors) for each in listed]
    save_described(path, _KIND, tensors, {"edits": found})


def load(path: str | os.PathLike[str]) -> list[EditRequest]:
    """The edits of a file, in their order; tensors are on the CPU.

    Raises:
        InvalidInput: the file holds no edits, or is of a newer version.
        UnknownName: it holds an edit of an unknown kind.
    """
    content, tensors = load_described(path, _KIND)
    return [_unpacked_edit(each, tensors) for each in content["edits"]]


def _packed_edit(edit: EditRequest, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(edit).__name__
    if kind not in _KINDS:
        raise InvalidInput(
            f"{edit.describe()}: a function cannot be saved; kinds: {', '.join(_KINDS)}"
        )
    packed = {}
    for each in fields(edit):
        try:
            packed[each.name] = _packed(getattr(edit, each.name), tensors)
        except TypeError as error:
            raise InvalidInput(
                f"{edit.describe()}: {each.name} cannot be saved: {error}"
            ) from error
    return {"kind": kind, "fields": packed}


def _unpacked_edit(content: dict[str, Any], tensors: dict[str, Tensor]) -> EditRequest:
    if content["kind"] not in _KINDS:
        raise UnknownName("kind of edit", content["kind"], _KINDS)
    values = {name: _unpacked(value, tensors) for name, value in content["fields"].items()}
    return _KINDS[content["kind"]](**values)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; whatever JSON does not tell apart gets a mark {"is": kind}."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"is": "float", "of": repr(value)}
    if isinstance(value, Tensor):
        name = f"tensor_{len(tensors)}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"is": "tensor", "of": name}
    if isinstance(value, list):
        return [_packed(each, tensors) for each in value]
    if isinstance(value, tuple | set | frozenset):
        listed = sorted(value) if isinstance(value, set | frozenset) else value
        return {"is": type(value).__name__, "of": [_packed(each, tensors) for each in listed]}
    if isinstance(value, slice | range):
        return {"is": type(value).__name__, "of": [value.start, value.stop, value.step]}
    if isinstance(value, Cache):
        return {"is": "Cache", "of": [_packed(each, tensors) for each in value.values()]}
    if isinstance(value, Mapping):
        return {"is": "mapping", "of": {key: _packed(each, tensors) for key, each in value.items()}}
    if is_dataclass(value) and type(value).__name__ in _VALUES:
        content = {each.name: getattr(value, each.name) for each in fields(value)}
        return {
            "is": type(value).__name__,
            "of": {key: _packed(each, tensors) for key, each in content.items()},
        }
    raise TypeError(f"{type(value).__name__} is no value that a file can hold")


_VALUES = {each.__name__: each for each in (Activation, Box, StepInfo, Mlp, Row)}
_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    kind, content = value["is"], value["of"]
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](_unpacked(each, tensors) for each in content)
    if kind == "slice":
        return slice(*content)
    if kind == "range":
        return range(*content)
    if kind == "Cache":
        return Cache([_unpacked(each, tensors) for each in content])
    if kind == "mapping":
        return {key: _unpacked(each, tensors) for key, each in content.items()}
    if kind not in _VALUES:
        raise UnknownName("kind of value", kind, _VALUES)
    return _VALUES[kind](**{key: _unpacked(each, tensors) for key, each in content.items()})
