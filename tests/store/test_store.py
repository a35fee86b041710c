"""Reading a store against its files as safetensors and Parquet give them."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open
from store.conftest import fill

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.store.index import write_index
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.rows import blocks_of
from dreamreader.store.store import Store

HEADS, OUT = "block.attn:heads", "block.out"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Two units; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    fill(ReferenceWriter(folder, "0" * 64))
    return Store(folder)


def by_hand(folder: Path, site: str) -> list[tuple[int, torch.Tensor, dict]]:
    """Unit, values and key of every row, in the order of the files."""
    rows = []
    for file in sorted(folder.glob(f"shards/*/{site.replace(':', '@')}.safetensors")):
        samples = parquet.read_table(file.parent / "samples.parquet").to_pylist()
        with safe_open(file, framework="pt") as shard:
            values, keys, moments = (shard.get_tensor(n) for n in ("values", "keys", "moments"))
            if "scales" in shard.keys():  # noqa: SIM118
                values = values.float() * shard.get_tensor("scales")[:, None]
        for value, (sample, moment, branch, token) in zip(values, keys.tolist(), strict=True):
            times = dict(
                zip(
                    ("step", "evaluation", "timestep", "sigma", "fraction"),
                    moments[moment].tolist(),
                    strict=False,
                )
            )
            place = {"branch": ("cond", "uncond")[branch], "token": token}
            rows.append((value, {"sample": sample, **samples[sample], **times, **place}))
    return rows


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_rows_are_those_of_the_files(stored, written) -> None:
    folder = written(stored=stored)
    write_index(folder)
    for site in (HEADS, OUT):
        found, wanted = Store(folder).read(site), by_hand(folder, site)
        assert torch.equal(found.values, torch.stack([value for value, _ in wanted]))
        scaled = site == HEADS and stored in DTYPES[3:]
        assert found.values.dtype == (torch.float32 if scaled or site == OUT else stored)
        keys = found.keys.to_pylist()
        assert [unit.pop("unit") for unit in keys] == [
            n // (len(keys) // 2) for n in range(len(keys))
        ]
        assert keys == [key for _, key in wanted]


@pytest.mark.parametrize(
    "steps, kept",
    [
        (None, {0, 1, 2}),
        (1, {1}),
        (-1, {2}),
        ([0, -1], {0, 2}),
        (slice(1, None), {1, 2}),
        (slice(None, -1), {0, 1}),
        (range(0, 3, 2), {0, 2}),
        ({2}, {2}),
        (lambda step: step > 1, {2}),
        (7, set()),
        (np.array([0, 2]), {0, 2}),
        ([True, False, True], {0, 2}),
        (torch.tensor(2), {2}),
    ],
)
@pytest.mark.parametrize("branch", [None, "cond", ["uncond"], ["uncond", "cond"]])
def test_selections(steps, kept, branch, store) -> None:
    folder = store.path
    chosen = (
        {"cond", "uncond"} if branch is None else {branch} if isinstance(branch, str) else {*branch}
    )
    wanted = [
        v for v, key in by_hand(folder, HEADS) if key["step"] in kept and key["branch"] in chosen
    ]
    found = store.read(HEADS, steps, branch)
    assert len(found.values) == len(wanted) == store.segments(HEADS, steps, branch).total
    assert not wanted or torch.equal(found.values, torch.stack(wanted))
    few = store.read(HEADS, steps, branch, limit=5)
    assert torch.equal(few.values, found.values[:5])
    assert few.keys.to_pylist() == found.keys.to_pylist()[:5]


@pytest.mark.parametrize("limit", [-1, 1.5, "5", True])
def test_a_limit_that_is_no_number_of_rows(store, limit: object) -> None:
    with pytest.raises(InvalidInput, match="limit is an integer of at least 0, or None, got"):
        store.read(HEADS, limit=limit)
    assert len(store.read(HEADS, limit=0).values) == 0


def test_segments_that_touch_are_one(store) -> None:
    whole = store.segments(HEADS)
    assert whole.first.tolist() == [0, 0] and whole.rows.tolist() == [144, 144]
    assert whole.file.tolist() == [0, 1] and whole.file_rows.tolist() == [144, 144]
    one = store.segments(HEADS, branch="uncond")
    assert one.first.tolist() == [24, 72, 120] * 2 and one.rows.tolist() == [24] * 6
    assert one.file.tolist() == [0, 0, 0, 1, 1, 1] and one.file.dtype == np.int32
    assert {one.first.dtype, one.rows.dtype, one.file_rows.dtype} == {np.dtype(np.int64)}
    late = store.segments(HEADS, steps=[1, 2])
    assert late.first.tolist() == [48, 48] and late.rows.tolist() == [96, 96]
    assert all(Path(name).is_absolute() and Path(name).is_file() for name in whole.files)
    assert whole.site == store.sites[HEADS]
    none = store.segments(HEADS, steps=[])
    assert none.total == 0 and none.files == [] and len(none.first) == len(none.rows) == 0


def test_blocks_cover_all_rows_once(store) -> None:
    whole = store.read(OUT, branch="cond").values
    for rows in (1, 7, 1000):
        blocks = list(blocks_of(store.segments(OUT, branch="cond"), rows))
        assert all(len(block) <= rows for block in blocks)
        assert torch.equal(torch.cat([block.values for block in blocks]), whole)


def test_what_a_store_says_of_itself(store) -> None:
    folder = store.path
    assert list(store.sites) == [HEADS, OUT] and store.sites[OUT].hw == (2, 3)
    assert store.rows == 2 * (144 + 48) and store.rows_of(OUT) == 96
    assert store.nbytes == sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    assert store.steps == [0, 1, 2] and store.branches == ["cond", "uncond"]
    assert store.units == [0, 1] and repr(store) == f"Store('{folder}': 384 rows of 2 sites)"
    assert store.samples(1)["id"].to_pylist() == ["1-0", "1-1", "1-2", "1-3"]


def test_reading_leaves_files_as_they_are(written) -> None:
    folder = written()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for block in blocks_of(Store(folder).segments(OUT)):
        block.values.zero_()
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_bad_input(written, tmp_path) -> None:
    store = Store(written())
    with pytest.raises(UnknownName, match="unknown site 'block.uot'; nearest: block.out"):
        store.segments("block.uot")
    with pytest.raises(UnknownName, match="unknown branch 'con'; nearest: cond"):
        store.read(OUT, branch=["cond", "con"])
    with pytest.raises(InvalidInput, match="store: no unit 5 among its 2"):
        store.samples(5)
    with pytest.raises(InvalidInput, match="none is no store: it has no manifest.json"):
        Store(tmp_path / "none")
    file = store.path / "shards/000001/samples.parquet"
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"000001/samples.parquet is damaged \("):
        store.read(OUT)
    file.unlink()
    with pytest.raises(InvalidInput, match="000001/samples.parquet is missing"):
        store.read(OUT)


def test_opening_does_not_depend_on_the_number_of_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    scale = importlib.import_module("store_scale")
    scale.simulate(tmp_path / "store", 10**8, 1000, 50_000)
    found = scale.opened(tmp_path / "store")
    assert found["rows"] == found["segments"] == 10**8
    assert found["seconds"]["open"] < 2 and found["seconds"]["segments_of_all_sites"] < 1
    assert found["megabytes"]["peak"] - found["megabytes"]["imported"] < 100
    assert math.isclose(found["chosen"], 10**8 / 10 / 50 / 2 * 8, rel_tol=0.05)
