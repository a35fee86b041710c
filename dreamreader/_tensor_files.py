"""Safetensors files of one kind: tensors, with JSON that describes them in the header."""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamreader._checked import read_tensors, write_tensors
from dreamreader.errors import InvalidInput

VERSION = 1


def save_described(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], content: Mapping[str, Any]
) -> None:
    """Writes a file whole or not at all; the description is under the key `dreamreader.<kind>`."""
    text = json.dumps({"version": VERSION, **content}, allow_nan=False)
    write_tensors(path, tensors, {f"dreamreader.{kind}": text})


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises what is wrong with a file that is to be read; safetensors does not say which it was.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: with the name of the file.
        InvalidInput: it is a device or the like.
    """
    name = os.fspath(path)
    if not (os.path.isfile(name) or os.path.isdir(name)) and os.path.exists(name):
        raise InvalidInput(f"{name} is a device or pipe, no file")
    with open(name, "rb"):
        pass


def load_described(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file, on the CPU.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as `check_file` does.
        InvalidInput: it is no safetensors file, of another kind or version, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            known = f"dreamreader.{kind}" in (file.metadata() or {})
    except SafetensorError as error:
        raise InvalidInput(
            f"{name} is no safetensors file, or only a part of one: {error}"
        ) from error
    if not known:
        raise InvalidInput(f"{name} holds no {kind} of dreamreader")
    tensors, metadata = read_tensors(path)
    content = json.loads(metadata[f"dreamreader.{kind}"])
    if content.get("version") != VERSION:
        raise InvalidInput(f"{name} is of version {content.get('version')}, this reads {VERSION}")
    return content, tensors
