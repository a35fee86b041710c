"""The native writer: the files of the reference, byte for byte, whatever is written."""

import ctypes
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamreader._register import native
from dreamreader.errors import InvalidInput
from dreamreader.store.layout import SiteLayout
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.writer import NativeWriter, open_writer
from tests.store.conftest import fill
from tests.store.writing import MOMENTS, RUN, SAMPLES, WIDE, rows_of, same_files, unit

pytestmark = pytest.mark.skipif(native()[0] is None, reason="the native module is not built")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_small_store_is_that_of_the_reference(native_writer, written, stored: torch.dtype):
    writer = native_writer()
    fill(writer, stored=stored)
    assert len(same_files(writer.shards, written("plain", stored=stored) / "shards")) == 8


@pytest.mark.parametrize("pool", ["none", "mean", "max"])
@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_slabs_are_cut_anywhere(native_writer, tmp_path: Path, stored: str, minus: bool, pool: str):
    """Rows of odd sizes over many slabs, several puts to a moment, strided and not finite x."""
    layouts = [
        SiteLayout("a:b", 333, getattr(torch, stored), torch.bfloat16, pool=pool),
        SiteLayout("b", 5, getattr(torch, stored), torch.float64, pool=pool),
    ]
    writer, plain = native_writer(), ReferenceWriter(tmp_path / "plain", RUN)
    for each in (writer, plain):
        numbers = [each.site(layout) for layout in layouts]
        each.begin(7)
        for n in range(9):
            for number, layout in zip(numbers, layouts, strict=True):
                x, places, keys = rows_of(layout, 32 + 40 * n, n, n // 3)
                x = (4 * x).round() + 0.0  # so that means are exact
                x[n % 8, 3, 2] = torch.inf if n % 2 else -torch.inf
                x = x.transpose(0, 1).contiguous().transpose(0, 1) if n % 2 else x
                groups = None
                if pool != "none":
                    groups = torch.arange(0, len(places) + 1, 4 if n % 2 else 2).int()
                    keys = keys[: len(groups) - 1]
                less = x.roll(1, 0).clamp(-9, 9) if minus else None
                each.put(number, x, places, keys, minus=less, groups=groups)
        counted = [each.not_finite(number) for number in numbers]
        assert all(counted)
        each.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    same_files(writer.shards, plain.shards)
    assert counted == [writer.not_finite(number) for number in (0, 1)]
    assert writer.info["early"] == 0


def test_more_sites_than_slabs(native_writer, tmp_path: Path):
    """Sites that become known in a unit share slabs; from the next unit on each has its own."""
    layouts = [SiteLayout(f"site{n}", 50 + n, torch.float32, torch.float32) for n in range(24)]
    writer, plain = native_writer(ring_bytes=1 << 20), ReferenceWriter(tmp_path / "plain", RUN)
    for number in (0, 1):
        for each in (writer, plain):
            each.begin(number)
            for n in range(4):
                for layout in layouts:
                    each.put(each.site(layout), *rows_of(layout, 25, n, n % 3))
            each.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
        assert writer.info["early"] > 0
    assert writer.info["slab_bytes"] == 1 << 16
    same_files(writer.shards, plain.shards)


def test_a_sealed_shard_is_a_safetensors_file(native_writer, tmp_path: Path):
    writer = native_writer()
    layout = SiteLayout("s", 300, torch.float32, torch.float32)
    unit(writer, layout=layout, puts=3, count=100)
    found = load_file(writer.shards / "000000" / "s.safetensors")
    for n in range(3):
        x, places, keys = rows_of(layout, 100, n, n)
        entry, token = places.long().unbind(1)
        assert torch.equal(found["values"][100 * n : 100 * n + 100], x[entry, token])
        assert torch.equal(found["keys"][100 * n : 100 * n + 100], keys)
    assert found["segments"][:, 3].sum() == 300 and found["moments"].shape == (3, 7)


def open_files(folder: Path) -> list[str]:
    """Files below a folder that this process holds open, deleted ones too."""
    held = (each for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
    return [name for name in map(os.readlink, held) if name.startswith(str(folder))]


def test_only_whole_units_can_be_seen(native_writer):
    writer = native_writer()
    site = writer.site(WIDE)
    writer.begin(3)
    for n in range(10):
        writer.put(site, *rows_of(WIDE, 40, n))
        assert all(path.name.startswith(".") for path in writer.shards.iterdir())
    writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert [path.name for path in writer.shards.iterdir()] == ["000003"]
    writer.begin(4)
    for n in range(10):
        writer.put(site, *rows_of(WIDE, 40, n))
    (part,) = (path for path in writer.shards.iterdir() if path.name != "000003")
    assert part.match(".*.part") and open_files(part)  # folders of jobs drop those of this name
    writer.abandon()
    assert [path.name for path in writer.shards.iterdir()] == ["000003"] and not open_files(part)
    unit(writer, 4)
    assert sorted(path.name for path in writer.shards.iterdir()) == ["000003", "000004"]


def test_a_put_without_rows_writes_nothing(native_writer, tmp_path: Path):
    for each in (native_writer(), ReferenceWriter(tmp_path / "plain", RUN)):
        site = each.site(WIDE)
        each.begin(0)
        assert each.put(site, *rows_of(WIDE, 0)) == 0
        assert each.seal(SAMPLES, MOMENTS, ["cond"]) == []


def test_a_slow_disk_makes_put_wait(native_writer, tmp_path: Path):
    writer, plain = native_writer(slow=5000), ReferenceWriter(tmp_path / "plain", RUN)
    assert unit(writer) == unit(plain) == 240
    assert writer.info["waits"] > 0
    same_files(writer.shards, plain.shards)


def test_a_slow_disk_may_leave_rows_out(native_writer):
    """A put is kept whole or not at all, and every row that is not there is counted."""
    writer = native_writer(slow=20_000, pressure="sample", threads=1)
    site = writer.site(WIDE)
    writer.begin(0)
    kept = [writer.put(site, *rows_of(WIDE, 15 + n, n, n % 3)) for n in range(24)]
    gone = {m: sum(15 + n for n in range(m, 24, 3) if not kept[n]) for m in range(3)}
    assert writer.left_out(site) == {m: rows for m, rows in gone.items() if rows} != {}
    writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert writer.info["waits"] == 0
    assert {0} < set(kept) and all(n in (0, 15 + i) for i, n in enumerate(kept))
    found = load_file(writer.shards / "000000" / "wide.safetensors")
    assert len(found["values"]) == sum(kept)
    assert found["moments"][:, 5].tolist() == [gone[m] for m in range(3)]
    first = next(n for n in range(24) if kept[n])
    assert torch.equal(found["keys"][: 15 + first], rows_of(WIDE, 15 + first, first, first % 3)[2])


def test_a_site_of_which_all_was_left_out_is_written(native_writer):
    writer = native_writer(slow=300_000, pressure="sample", threads=1, ring_bytes=1 << 17)
    late = SiteLayout("late", 1024, torch.float32, torch.float32)
    first, second = writer.site(WIDE), writer.site(late)
    writer.begin(0)
    writer.put(first, *rows_of(WIDE, 16))
    assert writer.put(second, *rows_of(late, 40, moment=1)) == 0
    shards = writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert [(each.site.name, each.rows) for each in shards] == [("wide", 16), ("late", 0)]
    found = load_file(writer.shards / "000000" / "late.safetensors")
    assert found["values"].shape == (0, 1024) and found["moments"][:, 5].tolist() == [0, 40, 0]


def test_threads_write_while_python_is_held(native_writer):
    """The lock of Python is held all the time in which the slabs are written."""
    writer = native_writer(slow=15_000, threads=1, ring_bytes=1 << 19)
    site = writer.site(WIDE)
    library = ctypes.PyDLL(None)  # its calls do not give the lock away
    library.lseek.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]
    library.lseek.restype = ctypes.c_long
    while True:
        writer.begin(0)
        writer.put(site, *rows_of(WIDE, 110))
        whole = 110 * WIDE.row_bytes - writer.info["slab_bytes"]  # the last slab is still open
        with next(writer.shards.glob(".*/*.safetensors")).open("rb") as file:
            number = file.fileno()
            size = before = library.lseek(number, 0, os.SEEK_END)
            turns = 0
            while size <= whole and turns < 3000:
                library.usleep(20_000)
                size, turns = library.lseek(number, 0, os.SEEK_END), turns + 1
        if before < whole:  # else the threads had ended before we looked
            break
        writer.abandon()
    assert whole < size


def test_after_the_first_unit_nothing_is_allocated(native_writer):
    module = ctypes.CDLL(None)
    if not hasattr(module, "mallinfo2"):
        pytest.skip("needs a recent glibc")
    fields = (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    ).split()
    info = type(
        "Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]}
    )
    module.mallinfo2.restype = info
    writer = native_writer()
    unit(writer, 0)
    grown = writer.info["grown"]
    puts = [rows_of(WIDE, 40, n, n % 3) for n in range(6)]
    site = writer.site(WIDE)
    grew = []  # the whole process's: another thread's allocation must not count as the writer's
    for number in range(1, 6):
        writer.begin(number)
        writer.put(site, *puts[0])
        tracemalloc.start()
        before = module.mallinfo2().uordblks + module.mallinfo2().hblkhd
        for put in puts[1:]:
            writer.put(site, *put)
        after = module.mallinfo2().uordblks + module.mallinfo2().hblkhd
        grew.append((after - before, tracemalloc.get_traced_memory()[0]))
        tracemalloc.stop()
        writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
        assert writer.info["grown"] == grown
    assert all(min(found) < 4096 for found in zip(*grew, strict=True))  # less than a row


WRONG = {
    "a place is outside x": {"places": torch.full((4, 2), 16).int()},
    "places must be dense int32": {"places": torch.zeros(4, 2).long()},
    "keys must be dense int32": {"keys": torch.zeros(4, 3).int()},
    "as many places as keys": {"places": torch.zeros(5, 2).int()},
    "the rows of one put have one moment": {"keys": torch.arange(16).reshape(4, 4).int()},
    "x has other features": {"x": torch.zeros(8, 16, 1023)},
    "got int32 .*; float16, bfloat16, float32 and float64 are": {
        "x": torch.zeros(8, 16, 1024).int()
    },
    "x and minus differ in shape": {"minus": torch.zeros(8, 15, 1024)},
    "x and minus differ in type": {"minus": torch.zeros(8, 16, 1024).double()},
    "groups are for sites with a pool": {"groups": torch.arange(5).int()},
    "groups must be": {"groups": torch.arange(4).int()},
    "a group without a place": {"groups": torch.tensor([0, 1, 1, 3, 4]).int()},
    "groups must go from 0": {"groups": torch.tensor([0, 1, 2, 3, 5]).int()},
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_rows_are_refused_and_leave_no_trace(native_writer, text: str):
    writer = native_writer()
    site = writer.site(WIDE)
    writer.begin(0)
    x, places, keys = rows_of(WIDE, 4)
    arguments = {"x": x, "places": places, "keys": keys} | WRONG[text]
    with pytest.raises(ValueError, match=text):
        writer.put(site, **arguments)
    assert writer.put(site, x, places, keys) == 4
    assert writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])[0].rows == 4


def test_memory_for_two_rows_is_the_least(native_writer):
    small = native_writer(ring_bytes=4096)
    small.site(WIDE)
    with pytest.raises(ValueError, match="ring_bytes must be at least 131072 for these sites"):
        small.begin(0)
    late = native_writer("late")
    late.begin(0)
    huge = SiteLayout("huge", 100_000, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"huge.safetensors needs more than .* before the unit"):
        late.put(late.site(huge), *rows_of(huge, 1))


def test_the_writer_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = open_writer(tmp_path, RUN, ring_bytes=1 << 18)
    assert isinstance(found, NativeWriter)
    found.close()
    monkeypatch.setenv("DREAMREADER_BACKEND", "reference")
    assert isinstance(open_writer(tmp_path, RUN), ReferenceWriter)
    with pytest.raises(InvalidInput, match="pressure='drop': use one of block, sample"):
        open_writer(tmp_path, RUN, pressure="drop")  # pyright: ignore[reportArgumentType]
    open_writer(tmp_path, RUN, ring_bytes=1 << 18, threads=1).close()
    with pytest.raises(InvalidInput, match="threads=0: both must be positive"):
        open_writer(tmp_path, RUN, threads=0)


def test_a_closed_unit_is_done_in_time(native_writer):
    """Dropping a unit does not wait until what is in memory is written."""
    writer = native_writer(slow=50_000, threads=1, ring_bytes=1 << 20)
    site = writer.site(WIDE)
    whole = 200 * WIDE.row_bytes - writer.info["slab_bytes"]  # the last slab is still open
    left = []
    for _ in range(5):  # on a busy machine all may be written before the unit is dropped
        writer.begin(0)
        writer.put(site, *rows_of(WIDE, 200))
        with next(writer.shards.glob(".*/*.safetensors")).open("rb") as file:
            writer.abandon()
            left.append(whole - os.fstat(file.fileno()).st_size)
        assert writer.info["written"] == 0
        if left[-1] > 0:
            break
    assert left[-1] > 0
