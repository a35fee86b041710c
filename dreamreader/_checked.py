"""Files that know their own checksum: every byte that is read back is the one that was written.

A file has, at one place, the name `dreamreader.sha256` and after it 64 hexadecimal digits: the
SHA-256 of the whole file with zeros in their place. In JSON it is the first key, in YAML a comment,
in safetensors and Parquet an entry of the metadata, so that other programs read the file as ever.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from dreamreader._files import explain_disk_errors, replacing
from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

KEY = "dreamreader.sha256"
_BLANK = "0" * 64
_STAMP = re.compile(rb"dreamreader\.sha256[^0-9a-z]{1,8}([0-9a-f]{64})")
_CHUNK = 1 << 20
_NO_STAMP = "it has no checksum, so it was not written here, or was changed"


def check(path: str | os.PathLike[str], hint: str = "", suffix: str | None = None) -> None:
    """Reads a file and compares it with its checksum.

    Args:
        path: of the file. hint: what to do, for the message.
        suffix: by which its format is known; that of its name where None.

    Raises:
        FileNotFoundError: there is none.
        InvalidInput: a byte is not what was written, or it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            at, said = _place(file, Path(path).suffix if suffix is None else suffix)
            found = _digest(file, at)
    except _Damaged as error:
        raise damage_error(path, str(error), hint) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    if found != said:
        raise damage_error(path, "it does not have its checksum", hint)


def checksum(path: str | os.PathLike[str], suffix: str | None = None) -> str:
    """The checksum that a file carries, 64 hexadecimal digits; `check` compares it."""
    with open(path, "rb") as file:
        return _place(file, Path(path).suffix if suffix is None else suffix)[1]


def damage_error(path: str | os.PathLike[str], why: str, hint: str = "") -> InvalidInput:
    """The error for a file that is not as it was written."""
    return InvalidInput(f"{path} is damaged ({why}){'; ' if hint else ''}{hint}")


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes plain values, whole or not at all.

    Raises:
        InvalidInput: the file cannot be written.
    """
    text = json.dumps({KEY: _BLANK, **content}, indent=1) + "\n"
    return write_text(path, text)


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInput: it is damaged.
    """
    check(path, hint)
    content = json.loads(path.read_bytes())
    content.pop(KEY)
    return content


def write_text(path: Path, text: str) -> Path:
    """Writes a text that has the name and 64 zeros somewhere; see `comment`."""
    with explain_disk_errors(path.parent), replacing(path) as part:
        part.write_bytes(text.encode())
        _stamp(part, path.suffix)
    return path


def comment(said: str) -> str:
    """The first line of a text whose comments begin with #."""
    return f"# {KEY} {_BLANK}: {said}\n"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as part:
        save_file(dict(tensors), part, metadata={KEY: _BLANK, **metadata})
        _order_metadata(part)
        _stamp(part, ".safetensors")


def read_tensors(
    path: str | os.PathLike[str], hint: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata that `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInput: it is damaged.
    """
    from safetensors import safe_open

    check(path, hint, ".safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del metadata[KEY]
    return tensors, metadata


def write_table(path: Path, table: "pa.Table", **options: Any) -> Path:
    """Writes a Parquet file, whole or not at all.

    Args:
        path: of the file. table: with its metadata. options: of `parquet.write_table`.
    """
    from pyarrow import parquet

    marked = table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: _BLANK})
    with explain_disk_errors(path.parent), replacing(path) as part:
        parquet.write_table(marked, part, **options)
        _stamp(part, path.suffix)
    return path


def read_table(path: Path, columns: Sequence[str] | None = None, hint: str = "") -> "pa.Table":
    """What `write_table` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInput: it is damaged.
    """
    from pyarrow import parquet

    check(path, hint)
    table = parquet.ParquetFile(path).read(columns)
    metadata = {k: v for k, v in (table.schema.metadata or {}).items() if k != KEY.encode()}
    return table.replace_schema_metadata(metadata or None)


class _Damaged(Exception):
    pass


def _stamp(path: Path, suffix: str) -> None:
    """Puts the checksum of a file into it."""
    with open(path, "r+b") as file:
        at, blank = _place(file, suffix)
        assert blank == _BLANK, blank
        digest = _digest(file, at)
        file.seek(at)
        file.write(digest.encode())


def _order_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, which its library writes in any order.

    So that equal tensors and metadata are equal files.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(_read(file, 0, 8), "little")
        header = json.loads(_read(file, 8, size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, path
        file.seek(8)
        file.write(text.ljust(size))


def _place(file: BinaryIO, suffix: str) -> tuple[int, str]:
    """Where the checksum of a file stands, and what it says."""
    size = file.seek(0, os.SEEK_END)
    start, stop = 0, size
    if suffix == ".safetensors":
        start, stop = 8, 8 + int.from_bytes(_read(file, 0, 8), "little")
    elif suffix == ".parquet":
        stop = size - 8
        start = stop - int.from_bytes(_read(file, max(stop, 0), 4), "little")
    if not 0 <= start <= stop <= size:
        raise _Damaged("it is cut off")
    found = list(_STAMP.finditer(_read(file, start, stop - start)))
    if len(found) != 1:
        raise _Damaged(_NO_STAMP)
    return start + found[0].start(1), found[0][1].decode()


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _digest(file: BinaryIO, at: int) -> str:
    """SHA-256 of a file with zeros for its checksum."""
    digest, done = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(_CHUNK):
        first, last = max(at - done, 0), min(at + 64 - done, len(chunk))
        if first < last:
            chunk = chunk[:first] + _BLANK[: last - first].encode() + chunk[last:]
        digest.update(chunk)
        done += len(chunk)
    return digest.hexdigest()
