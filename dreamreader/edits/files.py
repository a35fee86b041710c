"""Edits in a file: tensors as tensors, everything else as JSON in its metadata."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Self, TypeVar

from torch import Tensor

from dreamreader.artifacts import Artifact, import_package, pack, package_of, unpack
from dreamreader.edits.ablate import Ablate
from dreamreader.edits.loreft import LoReFT
from dreamreader.edits.mlp import Mlp
from dreamreader.edits.patch import Patch
from dreamreader.edits.probe_guidance import ProbeGuidance
from dreamreader.edits.simple import Clamp, Scale
from dreamreader.edits.steer import Steer
from dreamreader.edits.stitch import Stitch
from dreamreader.engine import Activation, Box, Cache, EditRequest, Row, StepInfo
from dreamreader.errors import InvalidInput, UnknownName

_KINDS: dict[str, type[EditRequest]] = {
    each.__name__: each
    for each in (Steer, Ablate, Scale, Clamp, Patch, Stitch, LoReFT, ProbeGuidance)
}
_VALUES = {  # names in files
    "Activation": Activation,
    "Box": Box,
    "Cache": Cache,
    "Instant": StepInfo,
    "Mlp": Mlp,
    "Row": Row,
}


E = TypeVar("E", bound=type[EditRequest])


def savable(edit: E) -> E:
    """Lets files hold edits of a class of another package: a decorator, above its `dataclass`."""
    _KINDS[edit.__name__] = edit
    return edit


class Edits(list[EditRequest], Artifact, kind="edits"):
    """Edits in their order, as a list that can be saved.

    Example:
        >>> Edits([Steer("0", torch.ones(4))]).save("edits.safetensors")
        >>> Edits.load("edits.safetensors") == [Steer("0", torch.ones(4))]
        True
    """

    def __init__(self, edits: EditRequest | Iterable[EditRequest] = ()):
        super().__init__([edits] if isinstance(edits, EditRequest) else edits)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, or patterns of sites, that are edited."""
        return tuple(dict.fromkeys(site for each in self for site in each.sites))

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        return tensors, {"edits": [_pack_edit(each, tensors) for each in self]}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        return cls([_unpack_edit(each, tensors) for each in content["edits"]])


def save(path: str | os.PathLike[str], edits: EditRequest | Sequence[EditRequest]) -> None:
    """Writes edits to a file that `load` reads back equal.

    Args:
        path: of the file, usually with the ending .safetensors.
        edits: one edit or several; the order is kept.

    Raises:
        InvalidInput: an edit holds a function (a predicate, or `Edit`), which no file can hold.
    """
    Edits(edits).save(path)


def load(path: str | os.PathLike[str]) -> Edits:
    """The edits of a file, in their order; tensors are on the CPU.

    Raises:
        InvalidInput: the file holds no edits, an edit of an unknown kind, or is damaged.
    """
    return Edits.load(path)


def _pack_edit(edit: EditRequest, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(edit).__name__
    if kind not in _KINDS:
        raise InvalidInput(
            f"{edit.describe()}: a function cannot be saved; kinds: {', '.join(_KINDS)}"
        )
    packed = {}
    for each in fields(edit):
        try:
            packed[each.name] = pack(getattr(edit, each.name), tensors, _VALUES)
        except TypeError as error:
            raise InvalidInput(
                f"{edit.describe()}: {each.name} cannot be saved: {error}"
            ) from error
    return {"kind": kind, "package": package_of(type(edit)), "fields": packed}


def _unpack_edit(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> EditRequest:
    if content["kind"] not in _KINDS:
        import_package(content.get("package"))
    if content["kind"] not in _KINDS:
        raise UnknownName("kind of edit", str(content["kind"]), _KINDS)
    values = {name: unpack(value, tensors, _VALUES) for name, value in content["fields"].items()}
    return _KINDS[content["kind"]](**values)
