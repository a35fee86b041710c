"""A unit of a store: a folder of shards that appears whole, under its number, or not at all."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader._files import explained, sync, write_atomic
from dreamreader.errors import InvalidInput
from dreamreader.store.checksum import crc32c
from dreamreader.store.layout import FORMAT, SiteLayout, check_format, unit_folder

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Shard:
    """The rows of one site in one unit, written.

    Attributes:
        rows, segments, moments: how many it has. bytes: of the file.
        checksum: CRC-32C of its header, its segments and its moments, in this order.
    """

    site: SiteLayout
    rows: int
    segments: int
    moments: int
    bytes: int
    checksum: int

    def as_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rows", "segments", "moments", "bytes")}
        return {
            "file": self.site.file,
            "site": self.site.as_dict(),
            **own,
            "checksum": self.checksum,
        }


def begin_unit(shards: Path, unit: int) -> Path:
    """A new folder for what is not sealed yet; readers do not see it."""
    with explained(shards.parent):
        if not shards.is_dir():
            shards.mkdir(parents=True, exist_ok=True)
            sync(shards.parent)
        return Path(tempfile.mkdtemp(prefix=f".{unit_folder(unit)}.", suffix=".part", dir=shards))


def seal_unit(
    part: Path, unit: int, run: str, shards: Sequence[Shard], samples: "pa.Table"
) -> Path:
    """Writes what is in the unit beside its shards, and makes it visible under its number.

    A unit that is there already is left as it is: the same unit has the same rows.

    Args:
        part: from `begin_unit`; its shards are written and on the disk.
        run: digest of the fingerprint.
        samples: one row for each sample; its place is what the keys of rows call it.
    """
    from pyarrow import parquet

    target = part.parent / unit_folder(unit)
    with explained(part.parent.parent):
        file = part / "samples.parquet"
        parquet.write_table(samples, file, write_page_checksum=True)
        content = {
            "format": FORMAT,
            "run": run,
            "samples": {"rows": samples.num_rows, **_whole(file)},
            "shards": [each.as_dict() for each in shards],
        }
        sync(file)
        write_atomic(part / "unit.json", json.dumps(content, indent=1) + "\n")
        part.chmod(0o755)
        sync(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(part)
        sync(part.parent)
    return target


def read_unit(folder: Path) -> Mapping[str, Any]:
    """The content of unit.json.

    Raises:
        InvalidInput: it is missing, damaged, or of a newer format.
    """
    file = folder / "unit.json"
    try:
        content = json.loads(file.read_bytes())
        found = content["format"]
    except FileNotFoundError:
        raise InvalidInput(f"{file} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{file} is damaged: {error}") from error
    check_format(file, found)
    return content


def _whole(file: Path) -> dict[str, int]:
    data = np.fromfile(file, dtype=np.uint8)
    return {"bytes": len(data), "checksum": int(crc32c_of(data))}


def crc32c_of(data: np.ndarray) -> int:
    """CRC-32C of one run of bytes."""
    return int(crc32c(data.reshape(1, -1))[0])
