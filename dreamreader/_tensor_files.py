"""Safetensors files of one kind: tensors, with JSON that describes them in the header."""

import errno
import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamreader._files import replacing
from dreamreader.errors import InvalidInput

VERSION = 1


def save_described(
    path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], content: Mapping[str, Any]
) -> None:
    """Writes a file whole or not at all; the description is under the key `dreamreader.<kind>`."""
    from safetensors.torch import save_file

    text = json.dumps({"version": VERSION, **content}, allow_nan=False)
    with replacing(path) as part:
        save_file(tensors, part, metadata={f"dreamreader.{kind}": text})


def load_described(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInput: it is no whole safetensors file, of another kind, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    if not os.path.exists(path):  # the error of safetensors does not say which file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(f"dreamreader.{kind}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InvalidInput(
            f"{name} is no safetensors file, or only a part of one: {error}"
        ) from error
    if text is None:
        raise InvalidInput(f"{name} holds no {kind} of dreamreader")
    content = json.loads(text)
    if content.get("version") != VERSION:
        raise InvalidInput(f"{name} is of version {content.get('version')}, this reads {VERSION}")
    return content, tensors
