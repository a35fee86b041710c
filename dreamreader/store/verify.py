"""Checking a store: that everything is there and as it was written."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import pyarrow as pa

from dreamreader._progress import Progress, show_progress, track
from dreamreader.errors import InvalidInput
from dreamreader.store.checksum import crc32c
from dreamreader.store.index import FILE, current, read_index, sealed_units
from dreamreader.store.layout import SiteLayout, Tensors, tensors_of, unit_folder
from dreamreader.store.manifest import Manifest
from dreamreader.store.shard import ADVICE, open_file, open_shard, read_into
from dreamreader.store.unit import Shard, Unit, crc32c_of, read_unit

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
        file: within the store. what: is wrong with it. rows: pairs first, last of the rows meant.
    """

    file: str
    what: str
    rows: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        units, shards, rows, bytes: how many were read. damage: all that is wrong.
    """

    units: int
    shards: int
    rows: int
    bytes: int
    damage: tuple[Damage, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damage


def verify(store: str | Path, progress: Progress = True) -> VerifyReport:
    """Reads every sealed byte of a store and compares it with its checksum.

    Args:
        store: its folder.
        progress: shown by default, or a function of a `ProgressEvent`, or False.

    Returns:
        What is wrong: units that are missing from a complete store, files that are missing or have
        another size, tables and rows that do not have their checksum, units of another harvest or
        there twice, an index that says other than the shards do.

    Raises:
        InvalidInput: it is no store, or its manifest is damaged or of a newer format.

    Example:
        >>> report = verify("activations")
        >>> report.holds
        True
    """
    folder = Path(store)
    units = sealed_units(folder)
    manifest = Manifest.read(folder) if Manifest.there(folder) or not units else Manifest()
    found = list(_missing(manifest, units))
    shards = rows = size = 0
    seen: dict[tuple[str, int], int] = {}
    latest: dict[tuple[int, int], int] = {}
    with show_progress(progress) as report:
        for unit in track(units, "units", report):
            path = folder / "shards" / unit_folder(unit)
            name = f"shards/{path.name}"
            found += damages(path)
            with suppress(InvalidInput):  # it is in these
                content = read_unit(path)
                found += _of_job(name, manifest, unit, content, seen, latest)
                for listed in content.shards.values():
                    shards, rows, size = shards + 1, rows + listed.rows, size + listed.bytes
    found += _of_index(folder, bool(found))
    return VerifyReport(len(units), shards, rows, size, tuple(found))


def damages(path: Path) -> Iterator[Damage]:
    """What is wrong in the files of a unit, every byte of which is read."""
    name = f"shards/{path.name}"
    try:
        content = read_unit(path)
    except InvalidInput as error:
        yield Damage(f"{name}/unit.json", str(error).removeprefix(f"{path}/unit.json "))
        return
    yield from _of_samples(path, name, content.samples)
    for file, listed in content.shards.items():
        yield from _of_shard(path / file, f"{name}/{file}", content, listed)


def _of_job(
    name: str,
    manifest: Manifest,
    number: int,
    unit: Unit,
    seen: dict[tuple[str, int], int],
    latest: dict[tuple[int, int], int],
) -> Iterator[Damage]:
    """Whether a unit is one of its store: of the job that has its number, once, in its order."""
    jobs = [job for job in manifest.jobs if job.units[0] <= number < job.units[1]]
    if manifest.jobs and not jobs:
        yield Damage(name, "no job of the store has a unit of this number")
    elif jobs and jobs[0].run != unit.run:
        yield Damage(name, f"is of another harvest, {unit.run[:16]}, not of {jobs[0].run[:16]}")
    elif (first := seen.setdefault((unit.run, unit.number), number)) != number:
        yield Damage(name, f"has the same samples as unit {unit_folder(first)}")
    elif jobs and latest.get(jobs[0].units, -1) > unit.number:
        yield Damage(name, "stands behind a unit that was made after it")
    if jobs:
        latest[jobs[0].units] = unit.number


def _missing(manifest: Manifest, units: Sequence[int]) -> Iterator[Damage]:
    if not manifest.complete:
        return
    planned = [unit for job in manifest.jobs for unit in range(*job.units)]
    missing = np.setdiff1d(planned, units)
    for first, last in _ranges(missing):
        shown = (
            unit_folder(first) if first == last else f"{unit_folder(first)} to {unit_folder(last)}"
        )
        yield Damage(f"shards/{shown}", "missing, though the store is said to be complete")


def _of_samples(path: Path, name: str, listed: Mapping[str, int]) -> Iterator[Damage]:
    file = path / "samples.parquet"
    wrong = _size(file, listed["bytes"])
    if wrong is None and crc32c_of(np.fromfile(file, np.uint8)) != listed["checksum"]:
        wrong = "does not have its checksum"
    if wrong is not None:
        yield Damage(f"{name}/samples.parquet", wrong)


def _of_shard(file: Path, name: str, unit: Unit, listed: Shard) -> Iterator[Damage]:
    at = tensors_of(listed.site, listed.rows, listed.segments, listed.moments)
    wrong = _size(file, listed.bytes)
    if wrong is None and at.bytes != listed.bytes:
        wrong = f"unit.json says {listed.bytes:,} bytes, its rows need {at.bytes:,}"
    if wrong is not None:
        yield Damage(name, wrong)
        return
    try:
        open_shard(file, unit)
    except InvalidInput as error:
        yield Damage(name, _strip_file(file, error))
    try:
        with open_file(file, at.bytes) as source:
            parts = list(_bad_rows(source, at, listed.site, listed.rows))
    except InvalidInput as error:  # cut off, or gone, since its length was compared
        yield Damage(name, _strip_file(file, error))
        return
    bad = np.concatenate([np.zeros(0, int), *parts])
    if len(bad):
        ranges = tuple(_ranges(bad))
        shown = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in ranges)
        yield Damage(name, f"rows {shown} do not have their checksums", ranges)


def _strip_file(file: Path, error: InvalidInput) -> str:
    """What an error says of a file, without its name and without the advice to verify."""
    said = str(error).removesuffix(ADVICE)
    return said.removeprefix(f"{file} ").removeprefix(f"{file}: ")


def _bad_rows(file: FileIO, at: Tensors, site: SiteLayout, rows: int) -> Iterator[np.ndarray]:
    """Rows that do not have their checksum, a block at a time.

    Raises:
        InvalidInput: the file has lost bytes.
    """

    def part(start: int, size: int, first: int, stop: int) -> np.ndarray:
        out = np.empty((stop - first) * size, np.uint8)
        read_into(file, start + first * size, out, at.bytes)
        return out.reshape(-1, size)

    block = max(BLOCK_BYTES // site.row_bytes, 1)
    parts = [(at.values, site.row_bytes), (at.keys, 16), *([(at.scales, 4)] if site.scaled else [])]
    for first in range(0, rows, block):
        stop = min(first + block, rows)
        wanted = part(at.checksums, 4, first, stop).view("<u4")[:, 0]
        found = crc32c(*(part(start, size, first, stop) for start, size in parts))
        yield first + np.flatnonzero(found != wanted)


def _size(file: Path, wanted: int) -> str | None:
    """What is wrong with a file's length."""
    if not file.is_file():
        return "missing"
    found = os.stat(file).st_size
    return None if found == wanted else f"has {found:,} bytes, was written with {wanted:,}"


def _of_index(folder: Path, damaged: bool) -> Iterator[Damage]:
    try:
        index = read_index(folder)
    except InvalidInput as error:
        yield Damage(FILE, str(error).removeprefix(f"{folder / FILE} "))
        return
    if index is None or damaged:  # damaged shards cannot be compared with
        return
    try:
        anew = current(folder, None)
    except InvalidInput as error:  # a shard is no more what it was when it was read
        yield Damage(FILE, f"cannot be compared with the shards: {error}")
        return
    known = np.isin(anew.table["unit"].to_numpy(), index.units)
    if not _equal(index.table, anew.table.filter(pa.array(known))):
        yield Damage(FILE, "does not say what the shards do; delete it: it is made anew from them")


def _equal(table: pa.Table, other: pa.Table) -> bool:
    """Equal lines, NaN being equal to itself."""
    if table.schema != other.schema or len(table) != len(other):
        return False
    for one, two in zip(table.columns, other.columns, strict=True):
        if pa.types.is_floating(one.type):
            same = np.array_equal(one.to_numpy(), two.to_numpy(), equal_nan=True)
        elif pa.types.is_dictionary(one.type):
            same = one.cast(pa.string()).equals(two.cast(pa.string()))
        else:
            same = one.equals(two)
        if not same:
            return False
    return True


def _ranges(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Ascending numbers as pairs first, last."""
    if not len(numbers):
        return []
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(part[0]), int(part[-1])) for part in parts]
