"""A run folder: what one run leaves behind, written so that it can be stopped at any moment.

    spec.yaml         what was asked for, with all defaults
    fingerprint.json  what the numbers depend on
    plan.json         which rows share a batch; a resumed run keeps it
    rows/             one Parquet file per finished batch, until the run is complete
    rows.parquet      all rows, once the run is complete
    artifacts/        images/, references/, and tensors that were fitted before the first row
    report.html

A file appears whole or not at all. What a batch found is in its file in rows/: while that is
missing, the batch counts as not run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from torch import Tensor

from dreamreader._files import explained, locked, replacing, write_atomic
from dreamreader.errors import InvalidInput
from dreamreader.experiments.row import Unit

FORMAT = 1
_FIRED = b"dreamreader.firing"  # keys of metadata in Parquet files
_MEASURED = b"dreamreader.measured"


class RunFolder:
    """Reads and writes one run folder.

    Args:
        path: of the folder; made at the first write.
    """

    def __init__(self, path: Path):
        self.path = Path(path)

    @property
    def rows_file(self) -> Path:
        return self.path / "rows.parquet"

    @property
    def is_complete(self) -> bool:
        return self.rows_file.is_file()

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "fingerprint.json").is_file()

    @property
    def has_rows(self) -> bool:
        """Whether something was computed here."""
        return self.is_complete or any((self.path / "rows").glob("batch-*.parquet"))

    def locked(self) -> AbstractContextManager[None]:
        """Keeps a second process out; see `locked`."""
        return locked(self.path)

    # small files

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, None where it does not exist.

        Raises:
            InvalidInput: it is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise InvalidInput(f"{file} is damaged ({error}); start in another folder") from error

    def write_json(self, name: str, content: Any) -> None:
        with explained(self.path):
            write_atomic(self.path / name, json.dumps(content, indent=1) + "\n")

    def write_text(self, name: str, content: str) -> None:
        with explained(self.path):
            write_atomic(self.path / name, content)

    # tensors

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of `artifacts/<name>.safetensors`, None where it does not exist."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._tensor_file(name)
        if not file.is_file():
            return None
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InvalidInput(f"{file} is damaged ({error}); delete it and run again") from error

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with explained(self.path), replacing(self._tensor_file(name)) as part:
            save_file({key: each.contiguous() for key, each in tensors.items()}, part)

    def _tensor_file(self, name: str) -> Path:
        return self.path / "artifacts" / f"{name}.safetensors"

    # pictures

    def image_file(self, row: int, kind: str = "images") -> Path:
        return self.path / "artifacts" / kind / f"{row:06d}.png"

    def keep_image(self, row: int, image: Tensor, kind: str = "images") -> None:
        """Writes a picture [3, h, w] in [0, 1] as PNG."""
        from dreamreader.report.blocks import to_pil

        with explained(self.path), replacing(self.image_file(row, kind)) as part:
            to_pil(image).save(part, format="PNG")

    # rows

    def finished(self, units: Sequence[Unit]) -> set[int]:
        """Numbers of the units whose file is there."""
        return {unit.number for unit in units if self._unit_file(unit).is_file()}

    def write_unit(
        self, unit: Unit, rows: Sequence[Mapping[str, Any]], measured: Sequence[str], fired: Any
    ) -> None:
        """Writes the rows of a batch: which columns were measured, and what fired, go with them."""
        names = list(dict.fromkeys(name for row in rows for name in row))  # rows may differ
        with one_kind():
            table = pa.table({name: [row.get(name) for row in rows] for name in names})
        notes = {_FIRED: json.dumps(fired).encode(), _MEASURED: json.dumps(measured).encode()}
        table = table.replace_schema_metadata(notes)
        with explained(self.path), replacing(self._unit_file(unit)) as part:
            parquet.write_table(table, part, write_page_checksum=True)

    def read_unit(self, unit: Unit) -> pa.Table:
        """The rows of one finished batch.

        Raises:
            InvalidInput: the file is damaged, or holds other rows.
        """
        file = self._unit_file(unit)
        hint = f"delete it and run again: its {unit.stop - unit.start} rows are computed anew"
        table = _read(file, hint)
        found = table.column("row").to_pylist() if "row" in table.column_names else []
        if found != list(range(unit.start, unit.stop)):
            raise InvalidInput(f"{file} does not hold rows {unit.start} .. {unit.stop - 1}; {hint}")
        return table

    def merge(self, units: Sequence[Unit]) -> None:
        """Puts the rows of all batches into rows.parquet."""
        tables = [self.read_unit(unit) for unit in units]
        notes = [table.schema.metadata or {} for table in tables]
        fired = [json.loads(each.get(_FIRED, b"[]")) for each in notes]
        plain = [table.replace_schema_metadata(None) for table in tables]
        with one_kind():
            whole = pa.concat_tables(plain, promote_options="permissive")
        whole = whole.replace_schema_metadata({_MEASURED: notes[0].get(_MEASURED, b"[]")})
        self.write_json("firing.json", fired)
        with explained(self.path), replacing(self.rows_file) as part:
            parquet.write_table(whole, part, write_page_checksum=True)

    def tidy(self, units: Sequence[Unit]) -> None:
        """Takes away the files of the batches, which rows.parquet holds now, and what writes that
        were stopped have left."""
        folder = self.path / "rows"
        if not folder.is_dir():
            return
        for unit in units:
            self._unit_file(unit).unlink(missing_ok=True)
        for part in self.path.rglob(".*.part"):
            part.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()

    def table(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All rows of a complete run, and the names of the columns that were measured.

        Raises:
            InvalidInput: the run is not complete, or the file is damaged.
        """
        if not self.is_complete:
            what = "is not complete: run it again to go on" if self.is_run else "is no run folder"
            raise InvalidInput(f"{self.path} {what}")
        hint = "restore it, or delete it and run again: all rows are computed anew"
        table = _read(self.rows_file, hint)
        measured = json.loads((table.schema.metadata or {}).get(_MEASURED, b"[]"))
        return table.to_pylist(), measured

    def _unit_file(self, unit: Unit) -> Path:
        return self.path / "rows" / f"batch-{unit.number:06d}.parquet"


def _read(file: Path, hint: str) -> pa.Table:
    try:
        return parquet.ParquetFile(file, page_checksum_verification=True).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidInput(f"{file} is damaged ({str(error).splitlines()[0]}); {hint}") from error


@contextmanager
def one_kind() -> Iterator[None]:
    """Says of a metric's column that no table can hold it."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"metrics: a column holds different kinds of values: {reason}") from None
