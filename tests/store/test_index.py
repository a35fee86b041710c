"""index.parquet against the keys of the rows it describes."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open
from store.conftest import fill

from dreamreader._checked import read_json, write_json, write_table
from dreamreader.errors import InvalidInput
from dreamreader.store.index import Index, current, read_index, sealed_units, write_index
from dreamreader.store.layout import Moment, SiteLayout
from dreamreader.store.manifest import Count, Job, Manifest
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.store import Store
from dreamreader.store.unit import crc32c_of

BRANCHES = ["cond", "uncond"]


def plain(table: pa.Table) -> list[dict]:
    return table.to_pylist()


def put(writer, site, keys, values=None) -> None:
    rows = len(keys)
    x = torch.zeros(rows, 1, site.width) if values is None else values[:, None]
    places = torch.stack([torch.arange(rows), torch.zeros(rows, dtype=torch.long)], 1).int()
    writer.put(writer.site(site), x, places, torch.tensor(keys, dtype=torch.int32))


def test_lines_are_the_runs_of_rows(written) -> None:
    folder = written()
    lines = plain(write_index(folder))
    at = 0
    for file in sorted(folder.glob("shards/*/*.safetensors")):
        with safe_open(file, framework="np") as shard:
            keys, moments = shard.get_tensor("keys"), shard.get_tensor("moments")
            own = json.loads(shard.metadata()["dreamreader.shard"])
        covered = 0
        while covered < len(keys):
            line = lines[at]
            assert line["first"] == covered and line["shard"] == str(file.relative_to(folder))
            rows = keys[line["first"] : line["first"] + line["rows"]]
            assert len(rows) == line["rows"] > 0 and len(np.unique(rows[:, 1:3], axis=0)) == 1
            times = [line[name] for name in ("step", "evaluation", "timestep", "sigma", "fraction")]
            assert times == moments[rows[0, 1], :5].tolist()
            assert line["branch"] == BRANCHES[rows[0, 2]] and line["run"] == "0" * 64
            assert line["site"] == own["site"]["name"] and line["width"] == own["site"]["width"]
            assert line["unit"] == int(file.parent.name) and line["shard_rows"] == len(keys)
            assert line["bytes"] == file.stat().st_size and line["dtype"] == own["site"]["stored"]
            at, covered = at + 1, covered + line["rows"]
    assert at == len(lines) == 2 * 2 * 3 * 2


def test_every_tool_reads_it(written) -> None:
    folder = written()
    table = write_index(folder)
    plainly = parquet.read_table(folder / "index.parquet")
    assert plainly.equals(table) and plainly.schema.field("site").type == pa.dictionary(
        pa.int32(), pa.string()
    )


def test_units_are_added_in_any_order(written) -> None:
    whole = written(units=4)
    expected = plain(write_index(whole))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        grown = whole.parent / f"grown{order[0]}"
        (grown / "shards").mkdir(parents=True)
        for unit in order:
            name = f"{unit:06d}"
            shutil.copytree(whole / "shards" / name, grown / "shards" / name)
            assert Store(grown).units == sorted(order[: order.index(unit) + 1])
            write_index(grown)
        assert plain(write_index(grown)) == expected == plain(Store(grown).index)
        found, wanted = (Store(each).segments("block.out") for each in (grown, whole))
        assert [Path(f).relative_to(grown) for f in found.files] == [
            Path(f).relative_to(whole) for f in wanted.files
        ]
        assert found.rows.tolist() == wanted.rows.tolist()


def test_units_it_knows_are_not_read_again(written) -> None:
    folder = written()
    write_index(folder)
    (folder / "shards/000000/unit.json").unlink()
    index = current(folder, read_index(folder))
    assert index.units == [0, 1]


def test_counts_go_to_the_manifest(tmp_path) -> None:
    writer = ReferenceWriter(tmp_path, "0" * 64)
    site = SiteLayout("a", 2, torch.float32, torch.float32)
    values = torch.tensor([[1.0, math.nan], [1, 1], [math.inf, 0]])
    for unit in range(2):
        writer.begin(unit)
        put(writer, site, [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]], values)
        put(writer, site, [[0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 2]], values)
        put(writer, site, [[0, 2, 0, 0]])
        times = [Moment(step, n, 1.0, 1.0, 0.0) for n, step in enumerate((4, 4, 7))]
        writer.seal(pa.table({"id": ["0"]}), times, BRANCHES)
        Manifest((Job("0" * 64, (0, 2)),)).write(tmp_path)
        write_index(tmp_path)
        write_index(tmp_path)
        assert Manifest.read(tmp_path).not_finite == (Count("a", 4, 4 * (unit + 1)),)
    assert Manifest.read(tmp_path).jobs == (Job("0" * 64, (0, 2)),)
    assert Manifest.read(tmp_path).left_out == ()
    assert Store(tmp_path).manifest.not_finite == (Count("a", 4, 8),)


def test_rows_left_out_are_counted(tmp_path, written) -> None:
    folder = written(units=1)
    file = folder / "shards/000000/block.out.safetensors"
    data = bytearray(file.read_bytes())
    moments = np.frombuffer(data[-3 * 56 :], "<f8").reshape(3, 7).copy()
    moments[1:, 5] = 3, 2
    file.write_bytes(data[: -3 * 56] + moments.tobytes())
    unit = folder / "shards/000000/unit.json"
    content = read_json(unit)
    listed = next(each for each in content["shards"] if each["file"] == file.name)
    whole, tables = np.fromfile(file, np.uint8), 16 * listed["segments"] + 3 * 56
    listed["checksum"] = crc32c_of(np.concatenate([whole[:8192], whole[-tables:]]))
    write_json(unit, content)
    write_index(folder)
    left_out = (Count("block.out", 1, 3), Count("block.out", 2, 2))
    assert Manifest.read(folder).left_out == left_out


def test_unsealed_folders_are_invisible(written) -> None:
    folder = written()
    for name in (".000002.abc.part", "notes", "00003"):
        shutil.copytree(folder / "shards/000001", folder / "shards" / name)
    assert sealed_units(folder) == [0, 1] and sealed_units(folder / "none") == []


def test_an_empty_store(tmp_path) -> None:
    Manifest().write(tmp_path)
    assert len(write_index(tmp_path)) == 0
    store = Store(tmp_path)
    assert (store.rows, store.nbytes, store.units, store.sites) == (0, 0, [], {})
    assert store.steps == [] and store.branches == []


def test_a_unit_without_rows(tmp_path) -> None:
    writer = ReferenceWriter(tmp_path, "0" * 64)
    writer.begin(0)
    writer.seal(pa.table({"id": ["0"]}), [], BRANCHES)
    write_index(tmp_path)
    assert Store(tmp_path).units == [0] and isinstance(read_index(tmp_path), Index)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"width": 9}, "rows of a have width 9, those before them width 8"),
        ({"stored": torch.int8}, "rows of a have stored int8, those before them stored float32"),
        ({"heads": 4}, "rows of a have heads 4, those before them heads None"),
    ],
)
def test_rows_under_one_name_go_together(change, text, tmp_path) -> None:
    layout = {"name": "a", "width": 8, "stored": torch.float32, "source": torch.float32}
    for unit, own in enumerate((layout, layout | change)):
        writer = ReferenceWriter(tmp_path, "0" * 64)
        writer.begin(unit)
        put(writer, SiteLayout(**own, hw=(unit + 1, 1)), [[0, 0, 0, 0]])
        writer.seal(pa.table({"id": ["0"]}), [Moment(0, 0, 1.0, 1.0, 0.0)], BRANCHES)
    with pytest.raises(InvalidInput, match="000001/a.safetensors: " + text):
        write_index(tmp_path)


def test_grids_may_differ(tmp_path) -> None:
    for unit in range(3):
        writer = ReferenceWriter(tmp_path, "0" * 64)
        writer.begin(unit)
        grid = (1, 1) if unit == 0 else (unit, 2)
        put(writer, SiteLayout("a", 8, torch.int8, torch.float32, hw=grid), [[0, 0, 0, 0]])
        writer.seal(pa.table({"id": ["0"]}), [Moment(0, 0, 1.0, 1.0, 0.0)], BRANCHES)
        write_index(tmp_path)
        assert Store(tmp_path).sites["a"].hw == (None if unit else (1, 1))


def test_a_damaged_index_is_refused_and_made_anew(written) -> None:
    folder = written()
    expected = plain(write_index(folder))
    file = folder / "index.parquet"
    data = file.read_bytes()
    refused = 0
    for place in range(0, len(data), 37):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:  # some bytes of Parquet say nothing
            assert plain(Store(folder).index) == expected
        except InvalidInput as error:
            assert re.search(
                r"index.parquet (is damaged \(.*; delete it: it|is of format)", str(error)
            )
            refused += 1
            with pytest.raises(InvalidInput, match="index.parquet is "):
                write_index(folder)
    assert refused > 50
    file.unlink()
    assert plain(write_index(folder)) == expected


def test_newer_formats_are_refused(written) -> None:
    folder = written(units=1)
    unit = folder / "shards/000000/unit.json"
    content = read_json(unit)
    write_json(unit, content | {"format": 3})
    with pytest.raises(InvalidInput, match="unit.json is of format 3, this version of dreamreader"):
        Store(folder)
    write_json(unit, content)
    table = write_index(folder)
    metadata = parquet.read_schema(folder / "index.parquet").metadata[b"dreamreader.index"]
    newer = {b"dreamreader.index": metadata.replace(b'"format": 1', b'"format": 2')}
    write_table(folder / "index.parquet", table.replace_schema_metadata(newer))
    with pytest.raises(InvalidInput, match="index.parquet is of format 2, this version"):
        Store(folder)


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda f: f.unlink(), "block.out.safetensors is missing"),
        (
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            r"has [\d,]+ bytes, was written with",
        ),
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "has 100 bytes, was written with"),
        (lambda f: f.write_bytes(b"\0" * 10760), "block.out.safetensors is damaged: its header or"),
        (lambda f: (f.parent / "unit.json").unlink(), "000001/unit.json is missing"),
        (lambda f: (f.parent / "unit.json").write_text("{"), r"000001/unit.json is damaged \("),
    ],
)
def test_damaged_units_are_named(damage, text, written) -> None:
    folder = written()
    damage(folder / "shards/000001/block.out.safetensors")
    with pytest.raises(InvalidInput, match=text):
        Store(folder)


def test_a_store_that_grows(tmp_path) -> None:
    writer = ReferenceWriter(tmp_path, "0" * 64)
    fill(writer, units=1)
    write_index(tmp_path)
    before = Store(tmp_path)
    fill(writer, units=3)  # unit 0 is there and stays
    after = Store(tmp_path)
    assert before.units == [0] and after.units == [0, 1, 2] and after.rows == 3 * before.rows
