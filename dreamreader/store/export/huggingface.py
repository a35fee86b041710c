"""A folder for each site that `datasets.load_from_disk` reads: Arrow streams and two JSON files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from dreamreader._files import write_atomic
from dreamreader.store.export.base import ChosenRows, array_of, name_of
from dreamreader.store.rows import RowBlock

SHARD_BYTES = 500 << 20
_NAMES = {"double": "float64", "float": "float32", "halffloat": "float16"}  # others are the same


def write(chosen: ChosenRows, out: Path) -> None:
    """Writes <site>/ with values, numbers of the sample, id, and when and where each row was taken.

    Prompts and other text of the samples are left out, as Arrow would repeat them in every row.
    """
    for site in chosen.sites:
        folder = out / name_of(site)
        folder.mkdir()
        _write_site(chosen, site, folder)


def _write_site(chosen: ChosenRows, site: str, folder: Path) -> None:
    files: list[str] = []
    writer, size, schema = None, 0, None
    for block in chosen.blocks(site):
        table = _table(chosen, block)
        if writer is None or size + table.nbytes > SHARD_BYTES:
            if writer is not None:
                writer.close()
            files.append(f"data-{len(files):05d}.arrow")
            writer, size = ipc.new_stream(str(folder / files[-1]), table.schema), 0
        writer.write_table(table)
        size, schema = size + table.nbytes, table.schema
    if writer is not None and schema is not None:
        writer.close()
        _describe(folder, files, schema, site)


def _describe(folder: Path, files: list[str], schema: pa.Schema, site: str) -> None:
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": hashlib.sha256(f"{folder.name} {schema}".encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {
        "citation": "",
        "description": f"Activations of {site}",
        "features": {field.name: _feature(field.type) for field in schema},
        "homepage": "",
        "license": "",
    }
    write_atomic(folder / "state.json", json.dumps(state, indent=2))
    write_atomic(folder / "dataset_info.json", json.dumps(info, indent=2))


def _table(chosen: ChosenRows, block: RowBlock) -> pa.Table:
    flat = pa.array(array_of(block.values).reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(flat, block.shard.site.width)
    columns: dict[str, Any] = {"values": values}
    keys = chosen.store.keys(block)
    for name, column in zip(keys.column_names, keys.columns, strict=True):
        if name in ("id", "branch"):
            columns[name] = column.cast(pa.string())
        elif pa.types.is_primitive(column.type):
            columns[name] = column
    return pa.table(columns)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """The type as `datasets` writes it; what it calls List was Sequence, which it reads too."""
    if isinstance(kind, pa.FixedSizeListType):
        return {
            "feature": _feature(kind.value_type),
            "length": kind.list_size,
            "_type": "Sequence",
        }
    return {"dtype": _NAMES.get(str(kind), str(kind)), "_type": "Value"}
