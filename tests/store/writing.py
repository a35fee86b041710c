"""What the tests of the writer write: rows, units, and the files that must be the same."""

import filecmp
from pathlib import Path

import pyarrow as pa
import torch

from dreamreader.store.layout import Moment, SiteLayout

RUN = "0" * 64
SAMPLES = pa.table({"id": ["a", "b"], "seed": [0, 1]})
MOMENTS = [Moment(n, 0, 900.0 - n, 1.0 / (n + 1), n / 3) for n in range(3)]
WIDE = SiteLayout("wide", 1024, torch.float32, torch.float32)


def rows_of(layout: SiteLayout, count: int, seed: int = 0, moment: int = 0):
    """x, places and keys of one put: `count` rows of 8 entries, in random places."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 16, layout.width, generator=g)
    places = torch.stack([torch.randint(0, n, (count,), generator=g) for n in (8, 16)], 1).int()
    keys = torch.stack(
        [places[:, 0] % 2, torch.full((count,), moment), places[:, 0] % 3 // 2, places[:, 1]], 1
    ).int()
    return x.to(layout.source), places, keys


def unit(writer, number: int = 0, puts: int = 6, count: int = 40, layout=WIDE) -> int:
    """One sealed unit of one site; returns how many rows were kept."""
    site = writer.site(layout)
    writer.begin(number)
    kept = 0
    for n in range(puts):
        kept += writer.put(site, *rows_of(layout, count, n, n % 3))
    writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    return kept


def same_files(one: Path, other: Path) -> list[str]:
    """Names of all files, which must be the same in both folders."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    there = sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    assert names and names == there
    same, different, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    assert not different and not missing
    return same
