"""Safetensors files of one kind: tensors, with JSON that describes them in the header."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamreader._checked import KEY, read_tensors, write_tensors
from dreamreader._files import explain_disk_errors
from dreamreader.errors import InvalidInput, MissingFile

FILE = "artifact.safetensors"  # its name in a folder of its own, as on the hub
_PREFIX = "dreamreader."


def save_described(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
    version: int = 1,
) -> None:
    """Writes a file whole or not at all; the description is under the key `dreamreader.<kind>`.

    Args:
        path: of the file.
        kind: of what it holds.
        tensors: by name, on any device; views and tensors that share memory are written each.
        content: plain values, as JSON has them.
        version: of the content.

    Raises:
        InvalidInput: a value or tensor is none that such a file can hold, or it cannot be written.
    """
    try:
        text = json.dumps({"version": version, **content}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: {kind} has a value that JSON cannot hold: {error}") from error
    with explain_disk_errors(Path(path).parent):
        write_tensors(path, _writable(path, tensors), {_PREFIX + kind: text})


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises what is wrong with a file that is to be read; safetensors does not say which it was.

    Raises:
        MissingFile, PermissionError: with the name of the file.
        InvalidInput: it is a folder, a device or the like.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        inside = sorted(each.name for each in Path(name).glob("*.safetensors"))
        hint = f"; name one of its files: {', '.join(inside[:5])}" if inside else ""
        raise InvalidInput(f"{name} is a folder, without a file {FILE}{hint}")
    if not os.path.exists(name):
        raise MissingFile(path)
    if not os.path.isfile(name):
        raise InvalidInput(f"{name} is a device or pipe, no file")
    with open(name, "rb"):
        pass


def load_described(
    path: str | os.PathLike[str], kind: str, version: int = 1
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file, on the CPU.

    Raises:
        MissingFile, PermissionError: as `check_file` does.
        InvalidInput: it is no safetensors file, of another kind or version, or damaged.
    """
    found, content, tensors = read_described(path)
    if found != kind:
        raise wrong_kind(path, kind, found)
    check_version(path, content, version)
    return content, tensors


def read_described(
    path: str | os.PathLike[str],
) -> tuple[str | None, dict[str, Any], dict[str, Tensor]]:
    """Kind, description and tensors of a file; no kind where it is none of this library.

    Raises:
        MissingFile, PermissionError: as `check_file` does.
        InvalidInput: it is no safetensors file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            if not _kinds(file.metadata()):
                return None, {}, {}
        tensors, metadata = read_tensors(path)
    except SafetensorError as error:
        raise InvalidInput(
            f"{name} is no safetensors file, or only a part of one: {error}"
        ) from error
    kinds = _kinds(metadata)
    if len(kinds) != 1:
        raise InvalidInput(f"{name} describes {len(kinds)} things, where one is needed")
    try:
        content = json.loads(metadata[_PREFIX + kinds[0]])
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{name}: its description is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{name}: its description is no JSON object")
    return kinds[0], content, tensors


def wrong_kind(path: str | os.PathLike[str], wanted: str, found: str | None) -> InvalidInput:
    """The error for a file that holds something else."""
    what = f"; it holds {found}, which dreamreader.load_artifact reads" if found else ""
    return InvalidInput(f"{os.fspath(path)} holds no {wanted} of dreamreader{what}")


def check_version(path: str | os.PathLike[str], content: Mapping[str, Any], version: int) -> None:
    """Refuses a description of another version than the one that is read.

    Raises:
        InvalidInput: it is later or earlier; says what to do.
    """
    found = content.get("version")
    if found != version:
        later = isinstance(found, int) and found > version
        todo = "update dreamreader" if later else "make it anew with this version of dreamreader"
        raise InvalidInput(f"{os.fspath(path)} is of version {found}, this reads {version}; {todo}")


def _kinds(metadata: Mapping[str, str] | None) -> list[str]:
    names = [each for each in metadata or {} if each.startswith(_PREFIX) and each != KEY]
    return [each.removeprefix(_PREFIX) for each in names]


def _writable(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, none of which shares memory with another."""
    found: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.dtype in _UNKNOWN:
            raise InvalidInput(
                f"{os.fspath(path)}: {name} is {value.layout} {value.dtype}, which a safetensors "
                "file cannot hold; give a dense tensor of another type"
            )
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.numel() and plain.untyped_storage().data_ptr() in used:
            plain = plain.clone()
        used.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


_UNKNOWN = (torch.complex32, torch.complex128)
