"""The prompts of a harvest: read once to be counted and checked, then from any place on."""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader.errors import InvalidInput
from dreamreader.specs.data import Item, item_of, scene_items
from dreamreader.specs.files import FileRows, Place
from dreamreader.specs.parts import Data

if TYPE_CHECKING:
    import pyarrow as pa

PROMPT = ("prompt", "text")  # columns that hold it
TAKEN = ("seed", "sample", "step", "timestep", "sigma", "branch", "token")
_APART = 4096  # prompts between two places that are noted
_EXACT = 2**53  # the integers up to here are float64


class Prompts:
    """Prompts of inline lists, scenes or files; of a file only places are in memory.

    Args:
        data: of the spec.

    Attributes:
        count: how many there are. digest: SHA-256 of all of them with their columns.
        kinds: of the values of each further column.

    Raises:
        InvalidInput: a file is missing or damaged, a row has no prompt, a column has different
            kinds of values, or there are no prompts at all. Files are read to their end for this.
    """

    def __init__(self, data: Data):
        self.file = None if data.file is None else Path(data.file)
        self.kinds: dict[str, str] = {}
        self._largest: dict[str, int] = {}
        self._listed = [] if self.file else _list_prompts(data)
        self._numbers: list[int] = []
        self._places: list[Place] = []
        self._rows: FileRows | None = None
        self._next = 0
        self.count, self.digest = self._scan(data.limit)
        self._state = self._stat()
        if not self.count:
            raise InvalidInput("data: there are no prompts")

    def read(self, start: int, stop: int) -> list[Item]:
        """Prompts number `start` .. `stop - 1`.

        Raises:
            InvalidInput: the file is not what it was when the prompts were counted.
        """
        stop = min(stop, self.count)
        if self.file is None:
            return self._listed[start:stop]
        if self._stat() != self._state:
            raise InvalidInput(f"{self.file} was changed while its prompts were read; run again")
        if self._rows is None or self._next > start:
            self._open(start)
        assert self._rows is not None
        found = []
        while self._next < stop:
            row, where = next(self._rows)
            if self._next >= start:
                found.append(_item(self._next, row, where))
            self._next += 1
        return found

    def table(self, items: Sequence[Item], seeds: Sequence[int]) -> "pa.Table":
        """One row for each item: id, prompt, seed and the further columns, always of one type."""
        import pyarrow as pa

        columns: dict[str, Any] = {
            "id": pa.array([item.id for item in items], pa.string()),
            "prompt": pa.array([item.prompt for item in items], pa.string()),
            "seed": pa.array(list(seeds), pa.int64()),
        }
        types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
        for name, kind in self.kinds.items():
            values = [item.columns.get(name) for item in items]
            if kind == "json":
                values = [None if each is None else _json(each) for each in values]
            columns[name] = pa.array(values, types.get(kind, pa.string()))
        return pa.table(columns)

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _open(self, start: int) -> None:
        """Goes to the last place that was noted before a prompt."""
        self.close()
        assert self.file is not None
        at = bisect_right(self._numbers, start) - 1
        self._next = self._numbers[at]
        self._rows = FileRows(self.file, self._places[at])

    def _scan(self, limit: int | None) -> tuple[int, str]:
        digest, count, ids = hashlib.sha256(), 0, _Ids()
        for item, where in self._all():
            self._note_kinds(item, where)
            ids.add(item.id)
            content = [item.id, item.prompt, dict(item.columns)]
            digest.update(_json(content).encode() + b"\n")
            count += 1
            if count == limit:
                break
        self._check_ids(ids.twice(), count)
        return count, digest.hexdigest()

    def _all(self) -> Iterator[tuple[Item, str]]:
        if self.file is None:
            yield from ((item, f"data: entry {item.id!r}") for item in self._listed)
            return
        rows = FileRows(self.file)
        number, last = 0, rows.place
        self._numbers, self._places = [0], [last]
        for row, where in rows:
            # of Parquet a place is the beginning of the row group that the row is in
            place, own = (rows.place, rows.place.line) if _is_parquet(self.file) else (last, number)
            if own >= self._numbers[-1] + _APART:
                self._numbers.append(own)
                self._places.append(place)
            yield _item(number, row, where), where
            number, last = number + 1, rows.place
        rows.close()

    def _check_ids(self, suspects: set[int], count: int) -> None:
        """Refuses an id that two rows of the file have, as id and seed name a row.

        Args:
            suspects: hashes that came twice. count: rows that are read.
        """
        places: dict[str, str] = {}
        if not suspects or self.file is None:
            return
        for number, (row, where) in zip(range(count), FileRows(self.file), strict=False):
            name = _item(number, row, where).id
            if _hash(name) in suspects and (first := places.setdefault(name, where)) != where:
                raise InvalidInput(f"{where}: {first} has the id {name!r} too")

    def _note_kinds(self, item: Item, where: str) -> None:
        for name, value in item.columns.items():
            if value is None:
                self.kinds.setdefault(name, "none")
                continue
            kind, known = _kind(value), self.kinds.get(name, "none")
            if kind == "int":
                self._largest[name] = max(self._largest.get(name, 0), abs(value))
            if "float" in (kind, known) and self._largest.get(name, 0) > _EXACT:
                raise InvalidInput(
                    f"{where}: the column {name!r} holds fractions and an integer beyond 2**53, "
                    "which no float64 holds exactly; write one of them as a text"
                )
            if known == "none" or {kind, known} == {"int", "float"}:
                self.kinds[name] = (
                    "float" if known == "int" else known if known == "float" else kind
                )
            elif kind != known:
                raise InvalidInput(
                    f"{where}: the column {name!r} holds {kind}, but {known} in rows before; a "
                    "column has one kind of values"
                )

    def _stat(self) -> tuple[int, int] | None:
        if self.file is None:
            return None
        found = self.file.stat()
        return found.st_size, found.st_mtime_ns


class _Ids:
    """Eight bytes for each id, once there is one that is not the number of its row."""

    def __init__(self):
        self._hashes = array("Q")
        self._count = 0

    def add(self, name: str) -> None:
        if not self._hashes and name != str(self._count):
            self._hashes.extend(_hash(str(number)) for number in range(self._count))
            self._hashes.append(_hash(name))
        elif self._hashes:
            self._hashes.append(_hash(name))
        self._count += 1

    def twice(self) -> set[int]:
        """Hashes that came more than once."""
        values, counts = np.unique(np.frombuffer(self._hashes, np.uint64), return_counts=True)
        return set(values[counts > 1].tolist())


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _list_prompts(data: Data) -> list[Item]:
    """Prompts that are in memory anyway."""
    if data.scenes is not None:
        return list(scene_items(data.scenes))
    found: dict[str, Item] = {}
    for number, entry in enumerate(data.prompts or ()):
        row = {"prompt": entry} if isinstance(entry, str) else entry
        item = _item(number, row, f"data.prompts.{number}")
        if item.id in found:
            raise InvalidInput(f"data.prompts.{number}: an earlier entry has the id {item.id!r}")
        found[item.id] = item
    return list(found.values())


def _item(number: int, row: Mapping[str, Any], where: str) -> Item:
    return item_of(number, row, where, PROMPT, (), TAKEN)


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _kind(value: Any) -> str:
    if isinstance(value, bool | str | float):
        return type(value).__name__
    return "int" if isinstance(value, int) else "json"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
