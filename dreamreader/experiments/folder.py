"""A run folder: what one run leaves behind, written so that it can be stopped at any moment.

Beside what the folder of any job has:

    rows/             one Parquet file per finished batch, until the run is complete
    rows.parquet      all rows, once the run is complete
    artifacts/        images/, references/, and tensors that were fitted before the first row
    firing.json       what edits and recordings did, batch by batch
    report.html

What a batch found is in its file in rows/: while that is missing, the batch counts as not run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from dreamreader._checked import damage_error, read_table, read_tensors, write_table, write_tensors
from dreamreader._files import explain_disk_errors, replacing
from dreamreader.errors import InvalidInput
from dreamreader.experiments.row import RowBatch
from dreamreader.jobs.folder import JobFolder

FORMAT = 1
_FIRED, _MEASURED = "dreamreader.firing", "dreamreader.measured"  # keys of metadata
_RUN = "dreamreader.run"
_FOREIGN = "it is of another run"


class RunFolder(JobFolder):
    """Reads and writes one run folder."""

    @property
    def rows_file(self) -> Path:
        return self.path / "rows.parquet"

    @property
    def is_complete(self) -> bool:
        return self.rows_file.is_file()

    @property
    def has_results(self) -> bool:
        return self.is_complete or any((self.path / "rows").glob("batch-*.parquet"))

    def state(self) -> str:
        plan = self.plan()
        if self.is_complete or plan is None:
            return super().state()
        there = len(list((self.path / "rows").glob("batch-*.parquet")))
        return f"stopped, {there:,} of {len(plan['units']):,} batches"

    # tensors

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of `artifacts/<name>.safetensors`, None where it does not exist."""
        file, hint = self._tensor_file(name), "delete it and run again"
        if not file.is_file():
            return None
        tensors, notes = read_tensors(file, hint)
        if notes.get(_RUN) != self.run:
            raise damage_error(file, _FOREIGN, hint)
        return tensors

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with explain_disk_errors(self.path):
            dense = {key: each.contiguous() for key, each in tensors.items()}
            write_tensors(self._tensor_file(name), dense, {_RUN: self.run})

    def _tensor_file(self, name: str) -> Path:
        return self.path / "artifacts" / f"{name}.safetensors"

    # pictures

    def image_file(self, row: int, kind: str = "images") -> Path:
        return self.path / "artifacts" / kind / f"{row:06d}.png"

    def keep_image(self, row: int, image: Tensor, kind: str = "images") -> None:
        """Writes a picture [3, h, w] in [0, 1] as PNG."""
        from dreamreader.report.blocks import to_pil

        with explain_disk_errors(self.path), replacing(self.image_file(row, kind)) as part:
            to_pil(image).save(part, format="PNG")

    # rows

    def finished_units(self, units: Sequence[RowBatch]) -> set[int]:
        """Numbers of the units whose file is there."""
        return {unit.number for unit in units if self._unit_file(unit).is_file()}

    def write_unit(
        self, unit: RowBatch, rows: Sequence[Mapping[str, Any]], measured: Sequence[str], fired: Any
    ) -> None:
        """Writes the rows of a batch: which columns were measured, and what fired, go with them."""
        names = list(dict.fromkeys(name for row in rows for name in row))  # rows may differ
        with one_kind():
            table = pa.table({name: [row.get(name) for row in rows] for name in names})
        notes = {_FIRED: json.dumps(fired), _MEASURED: json.dumps(measured), _RUN: self.run}
        write_table(self._unit_file(unit), table.replace_schema_metadata(notes))

    def read_unit(self, unit: RowBatch) -> pa.Table:
        """The rows of one finished batch.

        Raises:
            InvalidInput: the file is damaged, or holds other rows.
        """
        file = self._unit_file(unit)
        hint = f"delete it and run again: its {unit.stop - unit.start} rows are computed anew"
        table = self._table(file, hint)
        found = table.column("row").to_pylist() if "row" in table.column_names else []
        if found != list(range(unit.start, unit.stop)):
            raise InvalidInput(f"{file} does not hold rows {unit.start} .. {unit.stop - 1}; {hint}")
        return table

    def merge(self, units: Sequence[RowBatch]) -> None:
        """Puts the rows of all batches into rows.parquet."""
        tables = [self.read_unit(unit) for unit in units]
        notes = [table.schema.metadata or {} for table in tables]
        fired = [json.loads(each.get(_FIRED.encode(), b"[]")) for each in notes]
        plain = [table.replace_schema_metadata(None) for table in tables]
        with one_kind():
            whole = pa.concat_tables(plain, promote_options="permissive")
        own = {_MEASURED: notes[0].get(_MEASURED.encode(), b"[]"), _RUN: self.run}
        self.write("firing.json", {"run": self.run, "batches": fired})
        write_table(self.rows_file, whole.replace_schema_metadata(own))

    def firing(self) -> list[Any]:
        """What fired, batch by batch, of a complete run.

        Raises:
            InvalidInput: the file is missing, damaged or of another run.
        """
        found = self.need("firing.json")
        if found.get("run") != self.run:
            raise damage_error(self.path / "firing.json", _FOREIGN)
        return found["batches"]

    def clear(self, units: Sequence[RowBatch]) -> None:
        """Takes away the files of the batches, which rows.parquet holds now."""
        folder = self.path / "rows"
        with explain_disk_errors(self.path):
            for unit in units:
                self._unit_file(unit).unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def table(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All rows of a complete run, and the names of the columns that were measured.

        Raises:
            InvalidInput: the run is not complete, or the file is damaged.
        """
        self.need_complete()
        hint = "restore it, or delete it and run again: all rows are computed anew"
        table = self._table(self.rows_file, hint)
        measured = json.loads((table.schema.metadata or {}).get(_MEASURED.encode(), b"[]"))
        return table.to_pylist(), measured

    def _unit_file(self, unit: RowBatch) -> Path:
        return self.path / "rows" / f"batch-{unit.number:06d}.parquet"

    def _table(self, file: Path, hint: str) -> pa.Table:
        """A table of this run."""
        try:
            table = read_table(file, hint=hint)
        except FileNotFoundError:
            raise InvalidInput(f"{file} is missing; {hint}") from None
        if (table.schema.metadata or {}).get(_RUN.encode(), b"").decode() != self.run:
            raise damage_error(file, _FOREIGN, hint)
        return table


@contextmanager
def one_kind() -> Iterator[None]:
    """Says of a metric's column that no table can hold it."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"metrics: a column holds different kinds of values: {reason}") from None
