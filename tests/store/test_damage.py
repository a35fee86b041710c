"""Every reader of a store names damage, where it is, before it gives a wrong row."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.store import Store, StoreDataset
from dreamreader.store.export import export
from dreamreader.store.index import write_index
from dreamreader.store.layout import HEADER, SiteLayout, header_of
from dreamreader.store.manifest import Job, Manifest
from dreamreader.store.merge import merge
from dreamreader.store.shard import open_shard
from dreamreader.store.stats import stats
from dreamreader.store.unit import begin_unit, read_unit, seal_unit
from dreamreader.store.verify import verify

SITE = "block.out"
Made = dict[str, torch.Tensor | str]


def whole(store: Path, out: Path) -> Made:
    """What every reader of a store gives of one site."""
    read = Store(store).read(SITE)
    numbers = stats(store, SITE, covariance=True)
    export(store, out / "npy", "npy")
    exported = {each.name: each.read_bytes().hex() for each in sorted((out / "npy").iterdir())}
    merged = merge([store], out / "merged").read(SITE)
    loaded = list(StoreDataset(store, SITE, batch_size=5, shuffle=False))
    return {
        "read": read.values.clone(),
        "keys": str(read.keys.to_pylist()),
        "stats": str(numbers.as_dict()),
        "merged": merged.values.clone(),
        "loaded": torch.cat(loaded),
        **exported,
    }


def same(one: Made, two: Made) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]  # pyright: ignore
        for key, value in one.items()
    )


@pytest.fixture
def store(written: Callable[..., Path]) -> Path:
    folder = written()
    Manifest((Job("0" * 64, (0, 2)),), complete=True).write(folder)
    write_index(folder)
    return folder


READERS: dict[str, Callable[[Path, Path], object]] = {
    "read": lambda store, out: Store(store).read(SITE),
    "blocks": lambda store, out: [block.values for block in Store(store).blocks(SITE)],
    "keys alone": lambda store, out: [block.keys for block in Store(store).blocks(SITE)],
    "stats": lambda store, out: stats(store, SITE),
    "npy": lambda store, out: export(store, out / "e", "npy"),
    "webdataset": lambda store, out: export(store, out / "e", "webdataset"),
    "huggingface": lambda store, out: export(store, out / "e", "huggingface"),
    "loader": lambda store, out: list(StoreDataset(store, SITE, batch_size=4)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_byte_of_a_row_is_named(reader: str, store: Path, tmp_path: Path) -> None:
    file = store / "shards/000001/block.out.safetensors"
    data = bytearray(file.read_bytes())
    data[8192 + 3] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(DreamreaderError, match=r"000001/block.out.safetensors: row 0 is damaged"):
        READERS[reader](store, tmp_path)


def test_300_damages_are_refused_or_change_nothing(store: Path, tmp_path: Path) -> None:
    expected = whole(store, tmp_path / "expected")
    files = sorted(each.relative_to(store) for each in store.rglob("[!.]*") if each.is_file())
    rng, refused = random.Random(0), 0
    for number in range(300):
        damaged, out = tmp_path / "s", tmp_path / "out"
        for folder in (damaged, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(store, damaged)
        file = damaged / files[number % len(files)]
        data = bytearray(file.read_bytes())
        kind = rng.choice(["flip", "flip", "flip", "cut", "more", "zeros"])
        place = rng.randrange(len(data))
        if kind == "flip":
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "more":
            data += bytes(rng.randrange(1, 99))
        else:
            data[place : place + 16] = bytes(len(data[place : place + 16]))
        file.write_bytes(data)
        try:
            found = whole(damaged, out)
        except DreamreaderError as error:
            refused += 1
            assert str(damaged) in str(error), error
        else:
            assert same(found, expected), (files[number % len(files)], kind, place)
    assert refused > 200


def test_verify_finds_what_readers_refuse(store: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    files = sorted(each.relative_to(store) for each in store.rglob("[!.]*") if each.is_file())
    for name in files:
        damaged = tmp_path / "s"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(store, damaged)
        data = bytearray((damaged / name).read_bytes())
        data[rng.randrange(len(data))] ^= 1
        (damaged / name).write_bytes(data)
        try:
            assert not verify(damaged).holds, name
        except DreamreaderError as error:
            assert name.name == "manifest.json", error


def test_bytes_behind_the_end_of_a_shard_are_noticed(store: Path) -> None:
    file = store / "shards/000001/block.out.safetensors"
    size = file.stat().st_size
    with file.open("ab") as behind:
        behind.write(b"\0")
    text = f"block.out.safetensors has {size + 1:,} bytes, was written with {size:,}"
    with pytest.raises(InvalidInput, match=text):
        open_shard(file)
    assert not verify(store).holds


def test_a_unit_that_cannot_appear_is_an_error_and_is_kept(written: Callable[..., Path]) -> None:
    folder = written(units=1)
    unit, samples = read_unit(folder / "shards/000000"), pa.table({"id": ["a"]})
    part = begin_unit(folder / "shards", 1)
    (folder / "shards/000001").write_text("in the way")
    with pytest.raises(InvalidInput, match="cannot be written"):
        seal_unit(part, 1, unit.run, list(unit.shards.values()), samples)
    assert (part / "unit.json").is_file()
    (folder / "shards/000001").unlink()
    assert seal_unit(part, 1, unit.run, [], samples).is_dir() and not part.exists()


def test_a_header_may_be_exactly_full() -> None:
    site = SiteLayout("s", 4, torch.float32, torch.float32)

    def header(length: int) -> bytes:
        return header_of(site, 3, 1, 1, ["x" * length], "0" * 64)

    room = len(header(1)) - len(header(1).rstrip(b" "))
    full = header(1 + room)
    assert len(full) == HEADER and full.endswith(b"}}") and int.from_bytes(full[:8], "little")
    json.loads(full[8:])
    with pytest.raises(InvalidInput, match=f"need {HEADER - 7} bytes, the header of a shard has"):
        header(2 + room)
