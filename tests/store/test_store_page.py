"""The reader that docs/store.md gives to strangers, on stores of every dtype."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from dreamreader.store.checksum import crc32c as crc32c_of_rows
from dreamreader.store.index import write_index
from dreamreader.store.layout import MOMENTS, Moment, SiteLayout, site_from, tensors_of
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.store import Store

PAGE = Path(__file__).parents[2] / "docs" / "store.md"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The functions of the page."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    chosen = [block for block in blocks if "\ndef " in block or block.startswith("def ")]
    names: dict[str, Any] = {}
    exec("import json\nfrom pathlib import Path\n", names)
    for block in chosen:
        exec(re.split(r"^(?:heads =|assert )", block, flags=re.M)[0], names)
    return names


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 4])
def test_it_reads_what_the_store_reads(stored, samples, page, written) -> None:
    folder = written(stored=stored, samples=samples)
    store = Store(folder)
    for name, site in store.sites.items():
        parts = [page["shard"](folder / f"shards/{unit:06d}", site.file) for unit in store.units]
        rows = store.read(name)
        found = np.concatenate([page["values"](part) for part in parts])
        assert np.array_equal(found, rows.values.float().numpy())
        keys = np.concatenate([part["keys"] for part in parts])
        assert keys[:, 3].tolist() == rows.keys["token"].to_pylist()
        for part in parts:
            scales = [] if part["scales"] is None else [part["scales"][:, None].view("u1")]
            bytes_ = (part["values"], part["keys"].view("u1"), *scales)
            assert np.array_equal(crc32c_of_rows(*bytes_), part["checksums"])
            assert part["segments"][:, 3].sum() == len(part["keys"])
            assert part["moments"][:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_gaps_are_where_it_says(stored, page, tmp_path) -> None:
    writer = ReferenceWriter(tmp_path, "0" * 64)
    writer.begin(0)
    site = SiteLayout("a", 3, stored, torch.float32)
    number = torch.arange(5)
    keys = torch.stack([number * 0, number * 0, number * 0, number], 1).int()
    places = torch.stack([number * 0, number], 1).int()
    writer.put(writer.site(site), torch.randn(1, 5, 3), places, keys)
    writer.seal(pa.table({"id": ["0"]}), [Moment(0, 0, 1.0, 1.0, 0.0)], ["all"])
    part = page["shard"](tmp_path / "shards/000000", "a.safetensors")
    with safe_open(tmp_path / "shards/000000/a.safetensors", "np") as file:
        for name in set(part) - {"stored", "values"}:
            there = name in file.keys()  # noqa: SIM118
            assert there == (part[name] is not None)
            assert not there or np.array_equal(part[name], file.get_tensor(name))
    assert np.array_equal(page["values"](part), Store(tmp_path).read("a").values.float())


def test_float8_is_that_of_torch(page) -> None:
    every = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(page["float8"](every), wanted, equal_nan=True)


def test_checksums(page) -> None:
    data = np.random.default_rng(0).integers(0, 256, (3, 50), dtype=np.uint8)
    assert [page["crc32c"](row.tobytes()) for row in data] == crc32c_of_rows(data).tolist()


def test_it_names_every_field_and_column(written) -> None:
    folder, text = written(units=1), PAGE.read_text()
    table = write_index(folder)
    unit = json.loads((folder / "shards/000000/unit.json").read_text())
    fields = {*unit, *unit["samples"], *unit["shards"][0], *unit["shards"][0]["site"]}
    fields |= {*table.column_names, "left_out", "complete", "written_by", "jobs", "kind"}
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
    assert ", ".join(name.replace("_", " ") for name in MOMENTS) in text
    at = tensors_of(site_from(unit["shards"][0]["site"]), 3, 2, 1)
    assert at.values == 8192 and at.bytes == at.moments + 56
