"""Nested values as JSON and tensors, equal to the bit when read back."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from dreamreader.artifacts.kinds import Artifact, class_of, package_of
from dreamreader.errors import InvalidInput, UnknownName

_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}
_SPANS = {"slice": slice, "range": range}


def pack(value: Any, tensors: dict[str, Tensor], classes: Mapping[str, type] | None = None) -> Any:
    """JSON for a value; whatever JSON does not tell apart gets a mark {"is": kind, "of": content}.

    Args:
        value: plain values, tensors, collections of them, artifacts, and objects of `classes`.
        tensors: takes the tensors of the value, under numbered names.
        classes: what files call the classes that may occur: dataclasses, and mappings that are made
            of their values.

    Returns:
        Plain values for `unpack`.

    Raises:
        TypeError: a value is none of these.

    Example:
        >>> pack((1, float("inf")), {})
        {'is': 'tuple', 'of': [1, {'is': 'float', 'of': 'inf'}]}
    """
    names = {cls: name for name, cls in (classes or {}).items()}

    def pack_value(value: Any) -> Any:
        name = type(value).__name__
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"is": "float", "of": repr(value)}
        if isinstance(value, Tensor):
            key = f"tensor_{len(tensors)}"
            tensors[key] = value
            return {"is": "tensor", "of": key}
        if type(value) in names:
            if is_dataclass(value):
                own = {each.name: pack_value(getattr(value, each.name)) for each in fields(value)}
                return {"is": names[type(value)], "of": own}
            return {"is": names[type(value)], "of": [pack_value(each) for each in value.values()]}
        if isinstance(value, Artifact):
            return {"is": "artifact", "of": _pack_artifact(value, tensors)}
        if isinstance(value, list):
            return [pack_value(each) for each in value]
        if isinstance(value, tuple | set | frozenset):
            listed = sorted(value) if isinstance(value, set | frozenset) else value
            kind = next(each for each, cls in _CONTAINERS.items() if isinstance(value, cls))
            return {"is": kind, "of": [pack_value(each) for each in listed]}
        if isinstance(value, slice | range):
            return {"is": name, "of": [value.start, value.stop, value.step]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"is": "mapping", "of": {key: pack_value(each) for key, each in value.items()}}
        if isinstance(value, Mapping):  # JSON has no numbers as keys
            return {"is": "items", "of": [[pack_value(k), pack_value(v)] for k, v in value.items()]}
        raise TypeError(f"{name} is no value that a file can hold")

    return pack_value(value)


def unpack(
    value: Any, tensors: Mapping[str, Tensor], classes: Mapping[str, type] | None = None
) -> Any:
    """The value that `pack` described.

    Args:
        value: what `pack` gave. tensors: as `pack` filled them. classes: as for `pack`.

    Raises:
        UnknownName: a mark of another kind.
        InvalidInput: the description is none of `pack`.
    """
    known = classes or {}

    def unpack_value(value: Any) -> Any:
        if isinstance(value, list):
            return [unpack_value(each) for each in value]
        if not isinstance(value, dict):
            return value
        if set(value) != {"is", "of"}:
            raise InvalidInput(f"a value has {', '.join(map(str, value))} in place of 'is', 'of'")
        kind, content = value["is"], value["of"]
        if kind == "tensor":
            return tensors[content]
        if kind == "float":
            return float(content)
        if kind == "artifact":
            own = {name: tensors[key] for name, key in content["tensors"].items()}
            cls = class_of("this file", content["kind"], content["package"])
            return cls.of_file(own, content["content"])
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](unpack_value(each) for each in content)
        if kind in _SPANS:
            return _SPANS[kind](*content)
        if kind == "mapping":
            return {key: unpack_value(each) for key, each in content.items()}
        if kind == "items":
            return {unpack_value(key): unpack_value(each) for key, each in content}
        if kind not in known:
            raise UnknownName("kind of value", str(kind), known)
        if is_dataclass(known[kind]):
            return known[kind](**{key: unpack_value(each) for key, each in content.items()})
        return known[kind]([unpack_value(each) for each in content])

    return unpack_value(value)


def _pack_artifact(thing: Artifact, tensors: dict[str, Tensor]) -> dict[str, Any]:
    own, content = thing.to_file()
    keys = {}
    for name, tensor in own.items():
        keys[name] = f"tensor_{len(tensors)}"
        tensors[keys[name]] = tensor
    home = package_of(type(thing))
    return {"kind": thing.artifact_kind, "package": home, "content": content, "tensors": keys}
