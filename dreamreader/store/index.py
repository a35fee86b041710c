"""index.parquet: one line for each run of rows of one site, step, evaluation and branch.

It says nothing that the shards do not, so it can be deleted: it is made anew from them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader._checked import check, damage_error, write_table
from dreamreader.errors import InvalidInput
from dreamreader.store.layout import (
    FORMAT,
    MOMENTS,
    SiteLayout,
    check_format,
    is_sealed,
    site_from,
    unit_folder,
)
from dreamreader.store.manifest import Count, Manifest
from dreamreader.store.shard import ShardFile, open_shard
from dreamreader.store.unit import read_unit

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "index.parquet"
_OWN = b"dreamreader.index"  # key of the metadata in the Parquet file
_ANEW = "delete it: it is made anew from the shards"
_WORDS = ("shard", "site", "run", "branch", "dtype")  # columns with a dictionary
_COLUMNS = (
    "unit shard site run branch step evaluation timestep sigma fraction first rows width dtype "
    "shard_rows bytes"
).split()
_TIMES = ("step", "evaluation", "timestep", "sigma", "fraction")  # columns of moments
_SAME = ("unit", "shard", "site", "run", "width", "dtype", "shard_rows", "bytes")  # per shard

Counts = dict[tuple[str, int], int]


@dataclass(frozen=True)
class Index:
    """The index and what it knows of the store as a whole.

    Attributes:
        table: the lines, sorted by unit, file and first row.
        sites: what the rows of each site are. units: whose lines are there, ascending.
        left_out, not_finite: rows by site and step.
    """

    table: "pa.Table"
    sites: Mapping[str, SiteLayout] = field(default_factory=dict)
    units: Sequence[int] = ()
    left_out: Counts = field(default_factory=dict)
    not_finite: Counts = field(default_factory=dict)


def write_index(folder: Path) -> "pa.Table":
    """Adds the units sealed since to the index, and the counts of rows to the manifest.

    Returns:
        The whole index.

    Raises:
        InvalidInput: a unit is damaged, or rows of one site do not go together.
    """
    folder = Path(folder)
    index = current(folder, read_index(folder))
    save_index(folder, index)
    manifest = Manifest.read(folder) if Manifest.there(folder) else Manifest()
    counts = (_counts(index.left_out), _counts(index.not_finite))
    replace(manifest, left_out=counts[0], not_finite=counts[1]).write(folder)
    return index.table


def save_index(folder: Path, index: Index) -> Path:
    """Writes the index of a store, whole or not at all."""

    own = {
        "format": FORMAT,
        "sites": [site.as_dict() for site in index.sites.values()],
        "units": _ranges(index.units),
        "left_out": [[*key, rows] for key, rows in sorted(index.left_out.items())],
        "not_finite": [[*key, rows] for key, rows in sorted(index.not_finite.items())],
    }
    table = index.table.replace_schema_metadata({_OWN: json.dumps(own)})
    return write_table(folder / FILE, table, compression="zstd")


def read_index(folder: Path) -> Index | None:
    """The index as it was last written; None where there is none.

    Raises:
        InvalidInput: it is damaged or of a newer format.
    """
    import pyarrow as pa
    from pyarrow import parquet

    file = Path(folder) / FILE
    try:
        check(file, _ANEW)
    except FileNotFoundError:
        return None
    with parquet.ParquetFile(file, memory_map=True) as whole:
        metadata = whole.schema_arrow.metadata or {}
        if whole.schema_arrow.remove_metadata() != _schema():
            raise damage_error(file, "it has other columns", _ANEW)
        # One after the other: all at once take twice the memory.
        columns = [whole.read([name], use_threads=False)[name] for name in _COLUMNS]
    table = pa.table(columns, schema=_schema())
    own = json.loads(metadata[_OWN])
    check_format(file, own["format"])
    units = np.concatenate([np.arange(*pair) for pair in own["units"]] or [np.arange(0)])
    return Index(
        table,
        {each["name"]: site_from(each) for each in own["sites"]},
        units.tolist(),
        {(site, step): rows for site, step, rows in own["left_out"]},
        {(site, step): rows for site, step, rows in own["not_finite"]},
    )


def current(folder: Path, known: Index | None) -> Index:
    """The index with the sealed units that it does not have yet, read from their shards.

    Raises:
        InvalidInput: a unit is damaged, or rows of one site do not go together.
    """
    import pyarrow as pa

    known = Index(_schema().empty_table()) if known is None else known
    new = sorted(set(sealed_units(folder)).difference(known.units))
    if not new:
        return known
    sites, counts = dict(known.sites), (dict(known.left_out), dict(known.not_finite))
    shards = [(unit, shard) for unit in new for shard in open_unit(folder, unit)]
    for _, shard in shards:
        add_site(sites, shard.site, shard.path)
        for name, count in zip(("left_out", "not_finite"), counts, strict=True):
            _count(count, shard, MOMENTS.index(name))
    table = pa.concat_tables([known.table, table_of(shards)])
    if known.units and new[0] < known.units[-1]:
        table = table.take(np.argsort(table["unit"].to_numpy(), kind="stable"))
    return Index(table.combine_chunks(), sites, sorted({*known.units, *new}), *counts)


def sealed_units(folder: Path) -> list[int]:
    """Numbers of the units that readers see, ascending."""
    shards = Path(folder) / "shards"
    if not shards.is_dir():
        return []
    return sorted(int(entry.name) for entry in os.scandir(shards) if is_sealed(entry.name))


def open_unit(folder: Path, unit: int) -> list[ShardFile]:
    """The shards of a unit, by file."""
    path = Path(folder) / "shards" / unit_folder(unit)
    content = read_unit(path)
    return [open_shard(path / name, content) for name in sorted(content.shards)]


def add_site(sites: dict[str, SiteLayout], found: SiteLayout, where: object) -> None:
    """Adds a site to those of a store; the grid of tokens may differ, and is None then.

    Raises:
        InvalidInput: its rows are of another kind than those that are there under its name.
    """
    known = sites.setdefault(found.name, found)
    if known == found:
        return
    if replace(known, hw=None) != replace(found, hw=None):
        first, second = (
            ", ".join(_list_differences(a, b)) for a, b in ((known, found), (found, known))
        )
        raise InvalidInput(
            f"{where}: rows of {found.name} have {second}, those before them {first}"
        )
    sites[found.name] = replace(known, hw=None)


def table_of(shards: Sequence[tuple[int, ShardFile]]) -> "pa.Table":
    """The lines of shards and the units they belong to, in the order of the shards."""
    import pyarrow as pa

    lengths = [len(shard.segments) for _, shard in shards]
    words = {name: {} for name in _WORDS}
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for unit, shard in shards:
        moment, branch, first, rows = shard.segments.T
        at = shard.moments[moment]
        names = words["branch"]
        codes = [names.setdefault(name, len(names)) for name in shard.branches]
        columns["branch"].append(np.array(codes, np.int32)[branch])
        columns["first"].append(first)
        columns["rows"].append(rows)
        for number, name in enumerate(_TIMES):
            columns[name].append(at[:, number])
        for name, value in _same(unit, shard).items():
            known = words.get(name)
            columns[name].append(
                value if known is None else known.setdefault(value, len(known))  # pyright: ignore
            )
    arrays = {}
    for name, parts in columns.items():
        if name in _SAME:
            whole = np.repeat(np.array(parts, np.int64), lengths)
        else:
            whole = np.concatenate(parts or [np.zeros(0)])
        kind = _schema().field(name).type
        if name in _WORDS:
            codes, names = pa.array(whole.astype(np.int32)), pa.array(words[name], pa.string())
            arrays[name] = pa.DictionaryArray.from_arrays(codes, names)
        else:
            arrays[name] = pa.array(whole.astype(kind.to_pandas_dtype()))
    return pa.table(arrays, schema=_schema())


def _same(unit: int, shard: ShardFile) -> dict[str, int | str]:
    """What all lines of a shard have in common."""
    return {
        "unit": unit,
        "shard": f"shards/{unit_folder(unit)}/{shard.site.file}",
        "site": shard.site.name,
        "run": shard.run,
        "width": shard.site.width,
        "dtype": str(shard.site.stored).removeprefix("torch."),
        "shard_rows": shard.rows,
        "bytes": shard.at.bytes,
    }


def _schema() -> "pa.Schema":
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    kinds = {name: word for name in _WORDS}
    kinds |= {name: pa.int32() for name in ("unit", "step", "evaluation", "width")}
    kinds |= {name: pa.float64() for name in ("timestep", "sigma", "fraction")}
    return pa.schema([(name, kinds.get(name, pa.int64())) for name in _COLUMNS])


def _count(counts: Counts, shard: ShardFile, column: int) -> None:
    for at in shard.moments[shard.moments[:, column] > 0]:
        key = (shard.site.name, int(at[0]))
        counts[key] = counts.get(key, 0) + int(at[column])


def _counts(counts: Counts) -> tuple[Count, ...]:
    return tuple(Count(site, step, rows) for (site, step), rows in sorted(counts.items()))


def _ranges(units: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as pairs: first, one after the last."""
    if not len(units):
        return []
    parts = np.split(np.array(units), np.flatnonzero(np.diff(units) != 1) + 1)
    return [[int(part[0]), int(part[-1]) + 1] for part in parts]


def _list_differences(site: SiteLayout, other: SiteLayout) -> list[str]:
    pairs = ((name, value, other.as_dict()[name]) for name, value in site.as_dict().items())
    return [f"{name} {value}" for name, value, theirs in pairs if value != theirs and name != "hw"]
