"""Files of prompts, one row after another, from any place on that was noted before."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamreader.errors import InvalidInput
from dreamreader.specs.parse import parse_json

_ROWS = 1024  # of Parquet, in memory together


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row begins.

    Attributes:
        at: byte of the file; of Parquet the row group.
        line: lines (of Parquet rows) before it.
    """

    at: int = 0
    line: int = 0


Row = tuple[Mapping[str, Any], str]


class FileRows:
    """Iterates over the rows of a file: (row, where it stands, for messages).

    Only a line or a share of a row group is in memory.

    Args:
        path: TXT (a prompt a line), CSV, JSONL or Parquet.
        start: a `place` from before, to go on there.

    Attributes:
        place: from where the rows that have not come yet can be read. Of Parquet, this is the start
            of a row group; rows of it that came already have `place.line` and more before them.

    Raises:
        InvalidInput: the file is missing or of an unknown kind; while iterating: it is damaged,
            named with the line.
    """

    def __init__(self, path: Path, start: Place | None = None):
        if not path.is_file():
            raise InvalidInput(f"data.file: {path} does not exist")
        kind = path.suffix.lower()
        if kind not in _KINDS:
            raise InvalidInput(
                f"data.file: {path} ends in {kind!r}; known: .txt .csv .jsonl .parquet"
            )
        self.path = path
        self.place = start or Place()
        self._rows = _KINDS[kind](self)

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return next(self._rows)

    def close(self) -> None:
        self._rows.close()

    def lines(self) -> Iterator[str]:
        """The lines of a text with their ends; moves `place` behind each."""
        at, number = self.place.at, self.place.line
        with open(self.path, "rb") as file:
            file.seek(at)
            for raw in file:
                at, number = at + len(raw), number + 1
                # spreadsheets put a mark in front
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                try:
                    text = raw.decode()
                except UnicodeDecodeError as error:
                    raise InvalidInput(
                        f"{self.path}: no UTF-8 text ({error.reason} in line {number})"
                    ) from error
                self.place = Place(at, number)
                yield text


def _text_rows(file: FileRows) -> Iterator[Row]:
    for line in file.lines():
        if line.strip():
            yield {"prompt": line.strip()}, f"{file.path}:{file.place.line}"


def _csv_rows(file: FileRows) -> Iterator[Row]:
    names = None
    try:
        if file.place.at:
            names = csv.DictReader(FileRows(file.path).lines(), strict=True).fieldnames
        reader = csv.DictReader(file.lines(), names, strict=True)
        _check_names(file, reader.fieldnames or ())
        for row in reader:
            where = f"{file.path}:{file.place.line}"
            if None in row:
                raise InvalidInput(
                    f"{where}: {len(row[None])} more values than columns; a value with a comma "
                    'stands in "quotes"'
                )
            yield row, where
    except csv.Error as error:
        raise InvalidInput(f"{file.path}:{file.place.line}: no CSV: {error}") from error


def _json_rows(file: FileRows) -> Iterator[Row]:
    for line in file.lines():
        if not line.strip():
            continue
        where = f"{file.path}:{file.place.line}"
        row = parse_json(line, where)
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise InvalidInput(f"{where}: an object or a text expected, got {row!r}")
        yield row, where


def _parquet_rows(file: FileRows) -> Iterator[Row]:
    from pyarrow import parquet

    number = file.place.line
    try:
        with parquet.ParquetFile(file.path) as table:
            _check_names(file, table.schema_arrow.names)
            for group in range(file.place.at, table.num_row_groups):
                file.place = Place(group, number)
                for batch in table.iter_batches(_ROWS, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield row, f"{file.path}: row {number}"
                        number += 1
    except InvalidInput:
        raise
    except Exception as error:  # of damaged Parquet anything can be raised
        said = " ".join(str(error).split())
        raise InvalidInput(f"{file.path}: no whole Parquet file: {said}") from error


def _check_names(file: FileRows, names: Sequence[str]) -> None:
    """Refuses a column that is there twice: one of them would be read without a word."""
    if twice := [name for n, name in enumerate(names) if name in names[:n]]:
        raise InvalidInput(f"{file.path}: the column {twice[0]!r} is there twice")


_KINDS: dict[str, Callable[[FileRows], Any]] = {
    ".txt": _text_rows,
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
}
