"""State of a training in one safetensors file, without pickle, equal to the bit when read back."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamreader._tensor_files import load_described, save_described

_KIND = "training"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes nested dictionaries, lists, numbers and tensors."""
    tensors: dict[str, Tensor] = {}
    save_described(path, _KIND, tensors, {"state": _packed(state, tensors)})


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; tensors are on the CPU."""
    content, tensors = load_described(path, _KIND)
    return _unpacked(content["state"], tensors)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, float) and not math.isfinite(value):  # JSON has none
        return {"float": repr(value)}
    if isinstance(value, dict):  # keys may be numbers, which JSON does not have as keys
        return {"items": [[key, _packed(each, tensors)] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(each, tensors) for each in value]}
    if isinstance(value, list):
        return [_packed(each, tensors) for each in value]
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        # a copy, as sums depend on where in memory a tensor begins
        return tensors[value["tensor"]].clone()
    if "float" in value:
        return float(value["float"])
    if "tuple" in value:
        return tuple(_unpacked(each, tensors) for each in value["tuple"])
    return {key: _unpacked(each, tensors) for key, each in value["items"]}
