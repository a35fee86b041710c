"""Stores put together: the same rows, under new numbers."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from dreamreader._files import lock_folder
from dreamreader.errors import InvalidInput
from dreamreader.store import merge as module
from dreamreader.store.index import write_index
from dreamreader.store.manifest import Job, Manifest
from dreamreader.store.merge import merge
from dreamreader.store.shard import open_shard
from dreamreader.store.store import Store
from dreamreader.store.verify import verify

HEADS, OUT = "block.attn:heads", "block.out"


def make(written, name: str, units: int, complete: bool = True) -> Path:
    folder = written(name, name * 64, units=units)
    Manifest((Job(name * 64, (0, units), {"name": name}),), complete).write(folder)
    return folder


@pytest.mark.parametrize("link", [True, False])
def test_rows_of_all_stores_in_order(link, written, tmp_path) -> None:
    parts = [make(written, "a", 2), make(written, "b", 3)]
    write_index(parts[0])
    merged = merge(parts, tmp_path / "both", link)
    assert merged.units == [0, 1, 2, 3, 4] and verify(merged.path).holds
    for site in (HEADS, OUT):
        wanted = torch.cat([Store(part).read(site).values for part in parts])
        assert torch.equal(merged.read(site).values, wanted)
    ids = [merged.samples(unit)["id"][0].as_py() for unit in range(5)]
    assert ids == ["0-0", "1-0", "0-0", "1-0", "2-0"]
    jobs = (Job("a" * 64, (0, 2), {"name": "a"}), Job("b" * 64, (2, 5), {"name": "b"}))
    assert merged.manifest.jobs == jobs and merged.manifest.complete
    assert Manifest.read(merged.path) == merged.manifest
    pair = [folder / "shards/000000/unit.json" for folder in (parts[0], merged.path)]
    assert os.path.samefile(*pair) == link
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "both"]


@pytest.mark.parametrize("link", [True, False])
def test_damaged_rows_are_not_taken_over(link, written, tmp_path) -> None:
    parts = [make(written, "a", 2), make(written, "b", 1)]
    file = next((parts[0] / "shards/000001").glob("*.safetensors"))
    whole = bytearray(file.read_bytes())
    whole[open_shard(file).at.values] ^= 1  # which opening a shard does not read
    file.write_bytes(whole)
    text = rf"merge: .*: shards/000001/{file.name}: rows 0 do not have their .*; nothing was merged"
    with pytest.raises(InvalidInput, match=text):
        merge(parts, tmp_path / "both", link)
    assert not (tmp_path / "both").exists()


def test_a_merged_store_merges_again(written, tmp_path) -> None:
    parts = [make(written, name, 1) for name in "abc"]
    first = merge(parts[:2], tmp_path / "ab").path
    whole = merge([first, parts[2]], tmp_path / "abc")
    assert [job.units for job in whole.manifest.jobs] == [(0, 1), (1, 2), (2, 3)]


def test_of_incomplete_stores_the_sealed_units(written, tmp_path) -> None:
    one, two = make(written, "a", 4, complete=False), make(written, "b", 2)
    for unit in (0, 2):
        shutil.rmtree(one / f"shards/{unit:06d}")
    shutil.copytree(one / "shards/000001", one / "shards/.000009.x.part")
    merged = merge([one, two], tmp_path / "both")
    assert merged.units == [0, 1, 2, 3] and not merged.manifest.complete
    assert [job.units for job in merged.manifest.jobs] == [(0, 2), (2, 4)]
    assert merged.samples(0)["id"][0].as_py() == "1-0"


def test_where_links_are_not_possible_files_are_copied(written, tmp_path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError("another file system")

    parts = [make(written, "a", 1), make(written, "b", 1)]
    monkeypatch.setattr(os, "link", refuse)
    merged = merge(parts, tmp_path / "both")
    assert verify(merged.path).holds
    assert (merged.path / "shards/000000/unit.json").stat().st_nlink == 1


def test_after_a_failure_nothing_is_left(written, tmp_path, monkeypatch) -> None:
    def full(folder):
        raise KeyboardInterrupt

    parts = [make(written, "a", 1), make(written, "b", 1)]
    monkeypatch.setattr(module, "write_index", full)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "both")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_bad_input(written, tmp_path) -> None:
    one, two = make(written, "a", 1), make(written, "b", 1)
    other = written("c", units=1, stored=torch.int8)
    cases = [
        ([], tmp_path / "x", "merge: needs different stores, got "),
        ([one, tmp_path / "b" / ".." / "a"], tmp_path / "x", "merge: needs different stores, got"),
        ([one, two], two, "b is there already; name a new folder"),
        ([one, tmp_path / "none"], tmp_path / "x", "none is no store"),
        (
            [one, other],
            tmp_path / "x",
            "c: rows of block.attn:heads have stored int8, those before them stored bfloat16",
        ),
    ]
    for stores, out, text in cases:
        with pytest.raises(InvalidInput, match=text):
            merge(stores, out)
        assert not (tmp_path / "x").exists() and not (tmp_path / "none").exists()
    with lock_folder(two), pytest.raises(InvalidInput, match="b: another process runs here"):
        merge([one, two], tmp_path / "x")
    Manifest().write(tmp_path / "empty")
    with pytest.raises(InvalidInput, match="empty has no sealed units"):
        merge([one, tmp_path / "empty"], tmp_path / "x")
