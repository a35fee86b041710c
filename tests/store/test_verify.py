"""A store with one fault each: verify must name it, and nothing else."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from store.conftest import fill

from dreamreader._checked import read_json, write_json
from dreamreader.errors import InvalidInput
from dreamreader.store import verify as module
from dreamreader.store.index import read_index, save_index, write_index
from dreamreader.store.layout import header_of, tensors_of
from dreamreader.store.manifest import Job, Manifest
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.shard import open_shard
from dreamreader.store.verify import verify

UNIT = "shards/000001"
SHARD = f"{UNIT}/block.attn@heads.safetensors"
ROWS = 144
HEADER_DAMAGED = "is damaged: its header or tables do not have their checksum"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A complete store with rows that have scales; tests copy it."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    fill(ReferenceWriter(folder, "0" * 64), stored=torch.int8)
    Manifest((Job("0" * 64, (0, 2)),), complete=True).write(folder)
    write_index(folder)
    return folder


@pytest.fixture
def store(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def flip(file: Path, *places: int) -> None:
    data = bytearray(file.read_bytes())
    for place in places:
        data[place] ^= 0x10
    file.write_bytes(data)


def found(store: Path) -> list[tuple[str, str]]:
    return [(each.file, each.what) for each in verify(store).damage]


def test_a_sound_store(sound) -> None:
    events = []
    report = verify(str(sound), events.append)
    assert report.holds and report.damage == ()
    assert [(each.stage, each.done, each.total) for each in events] == [
        ("units", done, 2) for done in (0, 1, 2)
    ]
    assert (report.units, report.shards, report.rows) == (2, 4, 2 * (144 + 48))
    assert report.bytes == sum(f.stat().st_size for f in sound.rglob("*.safetensors"))


@pytest.mark.parametrize("block", [1, 700, 1 << 20])
@pytest.mark.parametrize("tensor", ["values", "keys", "scales", "checksums"])
def test_a_flipped_byte_in_a_row(tensor, block, store, monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    size = {"values": 12, "keys": 16, "scales": 4, "checksums": 4}[tensor]
    start = getattr(open_shard(store / SHARD).at, tensor)
    flip(store / SHARD, *(start + row * size + 3 for row in (0, 5, 6, 7, 143)))
    (damage,) = verify(store).damage
    assert damage.file == SHARD and damage.rows == ((0, 0), (5, 7), (143, 143))
    assert str(damage) == f"{SHARD}: rows 0, 5 to 7, 143 do not have their checksums"


def test_every_byte_of_a_small_shard_counts(store) -> None:
    file = store / UNIT / "block.out.safetensors"
    at, data = open_shard(file).at, file.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*rng.integers(0, 8192, 3), *rng.integers(8192, len(data), 6)]:
        flip(file, int(place))
        named = [each.file for each in verify(store).damage]
        assert named and set(named) == {f"{UNIT}/block.out.safetensors"}, (place, at)
        file.write_bytes(data)
    assert verify(store).holds


@pytest.mark.parametrize("tensor", ["header", "segments", "moments"])
def test_a_flipped_byte_elsewhere_in_a_shard(tensor, store) -> None:
    at = open_shard(store / SHARD).at
    flip(
        store / SHARD, {"header": 8000, "segments": at.segments, "moments": at.moments + 9}[tensor]
    )
    assert found(store)[0] == (SHARD, HEADER_DAMAGED)
    assert not any(damage.rows for damage in verify(store).damage)


def test_rows_are_checked_behind_a_damaged_header(store) -> None:
    flip(store / SHARD, 9, 8192 + 12 * 7)
    assert found(store) == [
        (SHARD, HEADER_DAMAGED),
        (SHARD, "rows 7 do not have their checksums"),
    ]


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda s: (s / SHARD).unlink(), (SHARD, "missing")),
        (
            lambda s: (s / UNIT / "unit.json").unlink(),
            (
                f"{UNIT}/unit.json",
                "is missing; delete the folder of the unit, and the command that made it makes it "
                "again",
            ),
        ),
        (
            lambda s: (s / UNIT / "samples.parquet").unlink(),
            (f"{UNIT}/samples.parquet", "missing"),
        ),
        (
            lambda s: flip(s / UNIT / "samples.parquet", 50),
            (f"{UNIT}/samples.parquet", "does not have its checksum"),
        ),
        (
            lambda s: shutil.rmtree(s / UNIT),
            (UNIT, "missing, though the store is said to be complete"),
        ),
    ],
    ids=["shard", "unit.json", "samples", "flipped samples", "unit"],
)
def test_what_is_missing_or_changed(damage, expected, store) -> None:
    damage(store)
    assert found(store) == [expected]


@pytest.mark.parametrize("name", [SHARD, f"{UNIT}/samples.parquet"])
@pytest.mark.parametrize("change", [-1, -5000, 1])
def test_another_length(name, change, store) -> None:
    file = store / name
    data = file.read_bytes()
    file.write_bytes((data + b"\0" * max(change, 0))[: max(len(data) + change, 3)])
    size, was = file.stat().st_size, len(data)
    assert found(store) == [(name, f"has {size:,} bytes, was written with {was:,}")]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"format": 4}, "is of format 4, this version of dreamreader reads up to 1"),
        ({"rows": 145}, "unit.json says 13,640 bytes, its rows need"),
        ({"width": "seven"}, "is damaged ("),
        ({"heads": 2}, "and unit.json describe different rows, sites or runs"),
        ({"run": "1" * 64}, "is of another harvest, 1111111111111111, not of 0000000000000000"),
        ({"stored": "lint8"}, "is damaged (AttributeError"),
    ],
)
def test_a_unit_json_that_says_something_else(change, text, store) -> None:
    file = store / UNIT / "unit.json"
    content = read_json(file)
    (name,) = change
    shard = content["shards"][0]
    for part in (content, shard, shard["site"]):
        if name in part:
            part.update(change)
    write_json(file, content)
    assert any(name.startswith(UNIT) and what.startswith(text) for name, what in found(store))


def test_a_unit_json_that_was_changed_by_hand(store) -> None:
    file = store / UNIT / "unit.json"
    file.write_text(file.read_text().replace('"rows": 144', '"rows": 145'))
    ((name, what),) = found(store)
    assert name == f"{UNIT}/unit.json" and what.startswith("is damaged (it does not have its che")


def test_a_unit_of_another_harvest_under_a_number_of_this_one(store, written) -> None:
    other = written("other", "1" * 64, stored=torch.int8)
    shutil.rmtree(store / UNIT)
    shutil.copytree(other / UNIT, store / UNIT)
    assert (UNIT, "is of another harvest, 1111111111111111, not of 0000000000000000") in found(
        store
    )


def test_units_that_changed_places(store) -> None:
    first, second = store / "shards/000000", store / UNIT
    first.rename(store / "shards/.x")
    second.rename(first)
    (store / "shards/.x").rename(second)
    assert (UNIT, "stands behind a unit that was made after it") in found(store)


def test_a_unit_that_is_there_twice(store) -> None:
    shutil.rmtree(store / UNIT)
    shutil.copytree(store / "shards/000000", store / UNIT)
    assert (UNIT, "has the same samples as unit 000000") in found(store)


def test_missing_units_are_named_in_ranges(store) -> None:
    Manifest((Job("0" * 64, (0, 5)), Job("1" * 64, (7, 8))), complete=True).write(store)
    text = "missing, though the store is said to be complete"
    assert found(store) == [("shards/000002 to 000004", text), ("shards/000007", text)]
    Manifest((Job("0" * 64, (0, 5)),), complete=False).write(store)
    assert verify(store).holds


def test_an_index_that_is_wrong(store) -> None:
    lines = parquet.read_metadata(store / "index.parquet").row_group(0).column(10)
    flip(store / "index.parquet", lines.dictionary_page_offset + lines.total_compressed_size - 1)
    ((name, text),) = found(store)
    assert name == "index.parquet" and text.startswith("is damaged (")
    (store / "index.parquet").unlink()
    assert verify(store).holds


def test_an_index_of_other_units(store, written) -> None:
    other = written("other", stored=torch.bfloat16)
    write_index(other)
    shutil.copy(other / "index.parquet", store / "index.parquet")
    text = "does not say what the shards do; delete it: it is made anew from them"
    assert found(store) == [("index.parquet", text)]


def test_an_index_without_some_lines(store) -> None:
    index = read_index(store)
    assert index is not None
    save_index(store, replace(index, table=index.table.slice(1)))
    text = "does not say what the shards do; delete it: it is made anew from them"
    assert found(store) == [("index.parquet", text)]


def test_units_that_the_index_does_not_have_yet(store) -> None:
    fill(ReferenceWriter(store, "0" * 64), units=3, stored=torch.int8)
    assert found(store) == [("shards/000002", "no job of the store has a unit of this number")]
    Manifest((Job("0" * 64, (0, 3)),), complete=True).write(store)
    report = verify(store)
    assert report.holds and report.units == 3


@pytest.mark.parametrize(
    ("block", "name", "what"),
    [
        (3, SHARD, "has 8,192 bytes, its rows need 13,640"),
        (ROWS, "index.parquet", "cannot be compared with the shards: .* has 8,192 bytes"),
    ],
)
def test_a_shard_that_is_cut_off_while_it_is_read_is_named(
    store, monkeypatch, block, name, what
) -> None:
    """The file is cut between two blocks; a mapping of it would end the process here."""
    blocks: list[int] = []
    plain = module.crc32c

    def cutting(*parts):
        blocks.append(len(parts[0]))
        if len(blocks) == block:
            os.truncate(store / SHARD, 8192)
        return plain(*parts)

    def cut_at(event):
        if event.done == 1:  # the shard is the first one there
            monkeypatch.setattr(module, "crc32c", cutting)

    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    (damage,) = verify(store, cut_at).damage
    assert damage.file == name and re.match(what, damage.what)


@pytest.mark.parametrize("size", [0, 8192, -1])
def test_a_shard_that_is_cut_off_after_it_was_opened_is_named(store, size) -> None:
    shard = open_shard(store / SHARD)
    whole = shard.at.bytes
    wanted = {name: getattr(shard, name)[:] for name in ("values", "keys", "scales", "checksums")}
    size = size if size >= 0 else whole + size
    os.truncate(shard.path, size)
    for name in wanted:
        for where in (slice(0, 2), np.array([ROWS - 1, 0])):
            with pytest.raises(InvalidInput, match=f"has {size:,} bytes, its rows need {whole:,}"):
                getattr(shard, name)[where]
    shard.path.unlink()
    with pytest.raises(InvalidInput, match="is missing; run `dreamreader store verify`"):
        shard.values[:1]


def test_rows_are_read_as_they_lie_in_the_file(sound) -> None:
    shard = open_shard(sound / SHARD)
    data = np.fromfile(shard.path, np.uint8)
    places = np.array([5, 143, 5, 0, 6, 7])
    for name, dtype in (("values", "u1"), ("keys", "<i4"), ("scales", "<f4"), ("checksums", "<u4")):
        column, start = getattr(shard, name), getattr(shard.at, name)
        size = column.row.itemsize
        whole = data[start : start + ROWS * size].view(dtype).reshape(ROWS, -1)
        for where in (slice(3, 9), slice(None), slice(9, 3), places, places[:0]):
            assert np.array_equal(column[where].reshape(-1, whole.shape[1]), whole[where])


def test_unsealed_folders_are_left_alone(store) -> None:
    shutil.copytree(store / UNIT, store / "shards/.000002.x.part")
    (store / "shards/.000002.x.part" / "unit.json").unlink()
    assert verify(store).holds


def test_not_a_store(store, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="none is no store"):
        verify(tmp_path / "none")
    manifest = store / "manifest.json"
    write_json(manifest, read_json(manifest) | {"format": 2})
    with pytest.raises(InvalidInput, match="manifest.json is of format 2, this version of"):
        verify(store)


def test_offsets_are_where_the_header_says(sound) -> None:
    shard = open_shard(sound / SHARD)
    assert tensors_of(shard.site, ROWS, len(shard.segments), len(shard.moments)) == shard.at


def test_a_shard_with_more_rows_than_segments_can_count_is_refused(sound) -> None:
    shard = open_shard(sound / SHARD)
    assert header_of(shard.site, 2**31 - 1, 1, 1, ["cond"], shard.run)
    with pytest.raises(InvalidInput, match="2,147,483,647 rows at most, not 2,147,483,648; make"):
        header_of(shard.site, 2**31, 1, 1, ["cond"], shard.run)
