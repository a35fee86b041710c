"""Exports, read with the tools they are for, against the rows of the store."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from store.conftest import fill

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.store import rows as blocks
from dreamreader.store.export import FORMATS, export, huggingface
from dreamreader.store.layout import SiteLayout
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.store import Store

HEADS, OUT = "block.attn:heads", "block.out"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("stores") / "store"
    fill(ReferenceWriter(folder, "0" * 64))
    return Store(folder)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """So small that every shard takes several."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 600)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_npy(stored, written, tmp_path) -> None:
    folder, events = written(stored=stored, units=1), []
    out = export(folder, tmp_path / "out", "npy", progress=events.append)
    assert sorted(os.listdir(out)) == [
        "block.attn@heads.keys.parquet",
        "block.attn@heads.npy",
        "block.out.keys.parquet",
        "block.out.npy",
    ]
    assert events[-1].done == events[-1].total == Store(folder).rows and len(events) > 5
    for site in (HEADS, OUT):
        rows, name = Store(folder).read(site), site.replace(":", "@")
        found = np.load(out / f"{name}.npy", mmap_mode="r")
        kept = torch.float16 if rows.values.dtype == torch.float16 else torch.float32
        assert torch.equal(torch.tensor(found), rows.values.to(kept))
        assert torch.tensor(found[:0]).dtype == kept
        assert parquet.read_table(out / f"{name}.keys.parquet").to_pylist() == rows.keys.to_pylist()


def test_selected_rows_of_one_site(store, tmp_path) -> None:
    out = export(store.path, tmp_path / "out", "npy", OUT, steps=slice(1, None), branch="uncond")
    rows = store.read(OUT, slice(1, None), "uncond")
    assert sorted(os.listdir(out)) == ["block.out.keys.parquet", "block.out.npy"]
    assert np.array_equal(np.load(out / "block.out.npy"), rows.values.numpy())


@pytest.mark.parametrize("size", [1000, 1 << 20])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_huggingface(stored, size, written, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", size)
    folder = written(stored=stored)
    out = export(folder, tmp_path / "out", "huggingface", branch="cond")
    assert (len(list((out / "block.attn@heads").glob("*.arrow"))) > 1) == (size == 1000)
    for site in (HEADS, OUT):
        rows = Store(folder).read(site, branch="cond")
        found = datasets.load_from_disk(str(out / site.replace(":", "@")))
        values = found.with_format("torch")["values"][:]
        kept = "float16" if rows.values.dtype == torch.float16 else "float32"
        assert found.features["values"].feature.dtype == kept
        assert torch.equal(values, rows.values.float())  # its own default for torch
        wanted = rows.keys.drop_columns(["prompt"])
        assert set(found.column_names) == {"values", *wanted.column_names}
        for name in wanted.column_names:
            assert found[name][:] == wanted[name].to_pylist()
        assert found.info.description == f"Activations of {site}"


def test_webdataset(store, tmp_path) -> None:
    out = export(store.path, tmp_path / "out", "webdataset", steps=[0, 2])
    assert sorted(os.listdir(out)) == ["000000.tar", "000001.tar"]
    seen = dict.fromkeys((HEADS, OUT), 0)
    rows = {site: store.read(site, steps=[0, 2]) for site in seen}
    lines = {site: rows[site].keys.to_pylist() for site in seen}
    for unit, file in enumerate(sorted(out.iterdir())):
        groups: dict[str, dict[str, bytes]] = {}
        with tarfile.open(file) as tar:
            for member in tar:
                key, kind = member.name.split(".", 1)  # as webdataset does
                groups.setdefault(key, {})[kind] = tar.extractfile(member).read()
        assert list(groups) == [f"{unit:06d}-{n:06d}" for n in range(4)]
        for sample, (_, group) in enumerate(groups.items()):
            assert list(group) == ["block.attn@heads.npy", "block.out.npy", "json"]
            about = json.loads(group["json"])
            assert (about["unit"], about["sample"], about["id"]) == (
                unit,
                sample,
                f"{unit}-{sample}",
            )
            assert about["prompt"] == f"prompt {sample} of unit {unit}" and about["seed"] == sample
            for site in seen:
                values = np.load(io.BytesIO(group[site.replace(":", "@") + ".npy"]))
                own = [
                    n
                    for n, key in enumerate(lines[site])
                    if (key["unit"], key["sample"]) == (unit, sample)
                ]
                assert np.array_equal(values, rows[site].values[own].float().numpy())
                for name, column in about["rows"][site].items():
                    assert column == [lines[site][n][name] for n in own]
                seen[site] += len(own)
    assert seen == {site: len(lines[site]) for site in seen}


def test_numbers_that_are_not_known_are_null(tmp_path) -> None:
    import pyarrow as pa

    from dreamreader.store.layout import Moment

    writer = ReferenceWriter(tmp_path / "store", "0" * 64)
    writer.begin(0)
    site = writer.site(SiteLayout("a", 2, torch.float32, torch.float32))
    key = torch.tensor([[0, 0, 0, 0]], dtype=torch.int32)
    writer.put(site, torch.ones(1, 1, 2), torch.zeros(1, 2, dtype=torch.int32), key)
    nan = float("nan")
    writer.seal(pa.table({"id": ["0"]}), [Moment(-1, 0, nan, nan, nan)], ["all"])
    out = export(tmp_path / "store", tmp_path / "out", "webdataset")
    with tarfile.open(out / "000000.tar") as tar:
        rows = json.load(tar.extractfile("000000-000000.json"))["rows"]["a"]
    assert rows["step"] == [-1] and rows["sigma"] == rows["timestep"] == rows["fraction"] == [None]


@pytest.mark.parametrize("format", FORMATS)
def test_exports_repeat_to_the_byte(format, store, tmp_path) -> None:
    files = []
    for name in "ab":
        out = export(store.path, tmp_path / name, format, OUT)
        found = sorted(each for each in out.rglob("*") if each.is_file())
        files.append([(each.relative_to(out), each.read_bytes()) for each in found])
    assert files[0] == files[1] and len(files[0]) >= 2


@pytest.mark.parametrize("format", FORMATS)
def test_after_a_failure_nothing_is_left(format, written, tmp_path) -> None:
    folder = written()
    file = folder / "shards/000001/block.out.safetensors"
    opened = Store(folder)
    from dreamreader.store.index import write_index

    write_index(folder)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InvalidInput, match=r"block.out.safetensors has [\d,]+ bytes, was written"):
        export(folder, tmp_path / "out", format)
    assert os.listdir(tmp_path) == ["store"] and opened.units == [0, 1]


def test_bad_input(store, tmp_path) -> None:
    with pytest.raises(UnknownName, match="unknown format 'numpy'; nearest: npy"):
        export(store.path, tmp_path / "out", "numpy")
    with pytest.raises(UnknownName, match="unknown site 'block.uot'; nearest: block.out"):
        export(store.path, tmp_path / "out", "npy", "block.uot")
    with pytest.raises(InvalidInput, match="no rows of block.out are chosen"):
        export(store.path, tmp_path / "out", "npy", [OUT], steps=9)
    with pytest.raises(InvalidInput, match=f"no rows of {HEADS}, {OUT} are chosen"):
        export(store.path, tmp_path / "out", "npy", steps=9)
    assert not (tmp_path / "out").exists()
    Path(tmp_path / "out").mkdir()
    with pytest.raises(InvalidInput, match="out is there already; name a new folder"):
        export(store.path, tmp_path / "out", "npy")
