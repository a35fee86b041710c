"""One .npy for each site, and beside it Parquet with what is known of each of its rows."""

from pathlib import Path

import numpy as np
from pyarrow import parquet

from dreamreader.store.export.base import ChosenRows, array_of, dtype_of, name_of

_DICTIONARY = 64 << 20  # bytes; prompts are long, and each should be there once for a block


def write(chosen: ChosenRows, out: Path) -> None:
    """Writes <site>.npy [rows, width] and <site>.keys.parquet, row for row."""
    for site in chosen.sites:
        segments, name = chosen.segments(site), name_of(site)
        kind, shape = dtype_of(segments.site), (segments.total, segments.site.width)
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
        keys = None
        with open(out / f"{name}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            for block in chosen.blocks(site):
                array_of(block.values).tofile(file)
                table = chosen.store.keys(block)
                keys = keys or parquet.ParquetWriter(
                    out / f"{name}.keys.parquet",
                    table.schema,
                    dictionary_pagesize_limit=_DICTIONARY,
                )
                keys.write_table(table)
        if keys is not None:
            keys.close()
