"""Tar files, one for each unit, with one group of members for each sample."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dreamreader.store.export.base import ChosenRows, array_of, name_of
from dreamreader.store.rows import RowBlock, blocks_of


def write(chosen: ChosenRows, out: Path) -> None:
    """Writes <unit>.tar: for each sample its rows as <key>.<site>.npy and one <key>.json.

    The key is <unit>-<sample>. The JSON has the columns of the sample and, under `rows`, for each
    site the step, branch, token and so on of each row of its array.
    """
    units: dict[int, list[RowBlock]] = {}
    for site in chosen.sites:
        # Blocks hold no values yet: with so many rows allowed, there is one for each shard.
        for block in blocks_of(chosen.segments(site), 1 << 62):
            units.setdefault(block.unit, []).append(block)
    for unit, blocks in sorted(units.items()):
        with tarfile.open(out / f"{unit:06d}.tar", "w") as tar:
            for sample, parts in _samples(blocks):
                _add(tar, chosen, unit, sample, parts)


def _samples(blocks: list[RowBlock]) -> Iterator[tuple[int, list[RowBlock]]]:
    """The rows of each sample, one block for each site that has some."""
    orders = [np.argsort(block.keys[:, 0], kind="stable") for block in blocks]
    sorts = [block.keys[order, 0] for block, order in zip(blocks, orders, strict=True)]
    for sample in np.unique(np.concatenate(sorts)):
        parts = []
        for block, order, sort in zip(blocks, orders, sorts, strict=True):
            first, stop = np.searchsorted(sort, [sample, sample + 1])
            if first < stop:
                own = block.places[order[first:stop]]
                parts.append(RowBlock(block.shard, block.unit, own))
        yield int(sample), parts


def _add(
    tar: tarfile.TarFile, chosen: ChosenRows, unit: int, sample: int, parts: list[RowBlock]
) -> None:
    key, rows = f"{unit:06d}-{sample:06d}", {}
    about = {"unit": unit, "sample": sample}
    about |= chosen.store.samples(unit).slice(sample, 1).to_pylist()[0]
    for block in parts:
        site, data = block.shard.site.name, io.BytesIO()
        np.save(data, array_of(block.values))
        _member(tar, f"{key}.{name_of(site)}.npy", data.getvalue())
        rows[site] = {name: _plain(column) for name, column in block.times().items()}
        chosen.count(len(block))
    text = json.dumps(about | {"rows": rows}, allow_nan=False)
    _member(tar, f"{key}.json", text.encode())


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


def _plain(column: pa.Array) -> list[Any]:
    """Values for JSON, which has no NaN."""
    return [None if value != value else value for value in column.to_pylist()]
