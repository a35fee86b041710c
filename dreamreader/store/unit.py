"""A unit of a store: a folder of shards that appears whole, under its number, or not at all."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader._checked import damage_error, read_json, write_json, write_table
from dreamreader._files import explain_disk_errors, sync
from dreamreader.errors import InvalidInput
from dreamreader.store.checksum import crc32c
from dreamreader.store.layout import FORMAT, SiteLayout, check_format, site_from, unit_folder

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
        own = {name: getattr(self, name) for name in _COUNTS}
        return {"file": self.site.file, "site": self.site.as_dict(), **own}


_COUNTS = ("rows", "segments", "moments", "bytes", "checksum")


@dataclass(frozen=True)
class Unit:
    """What unit.json says.

    Attributes:
        run: digest of the fingerprint of its harvest. number: that it was made under there.
        samples: `rows`, `bytes` and `checksum` of samples.parquet. shards: by file.
    """

    run: str
    number: int
    samples: Mapping[str, int]
    shards: Mapping[str, Shard]

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(each.bytes for each in self.shards.values())


def begin_unit(shards: Path, unit: int) -> Path:
    """A new folder for what is not sealed yet; readers do not see it."""
    with explain_disk_errors(shards.parent):
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
    target = part.parent / unit_folder(unit)
    with explain_disk_errors(part.parent.parent):
        file = part / "samples.parquet"
        write_table(file, samples)
        content = {
            "format": FORMAT,
            "run": run,
            "unit": unit,
            "samples": {"rows": samples.num_rows, **_whole(file)},
            "shards": [each.as_dict() for each in shards],
        }
        write_json(part / "unit.json", content)
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


def read_unit(folder: Path) -> Unit:
    """The content of unit.json.

    Raises:
        InvalidInput: it is missing, damaged, or of a newer format.
    """
    file = folder / "unit.json"
    try:
        content = read_json(file, _HINT)
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidInput(f"{file} is missing; {_HINT}") from None
    check_format(file, content.get("format"))
    try:
        shards = {
            each["file"]: Shard(site_from(each["site"]), *(int(each[name]) for name in _COUNTS))
            for each in content["shards"]
        }
        return Unit(content["run"], int(content["unit"]), content["samples"], shards)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damage_error(file, repr(error), _HINT) from error


_HINT = "delete the folder of the unit, and the command that made it makes it again"


def _whole(file: Path) -> dict[str, int]:
    data = np.fromfile(file, dtype=np.uint8)
    return {"bytes": len(data), "checksum": int(crc32c_of(data))}


def crc32c_of(data: np.ndarray) -> int:
    """CRC-32C of one run of bytes."""
    return int(crc32c(data.reshape(1, -1))[0])
