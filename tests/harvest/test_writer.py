"""The native writer: the files of the reference, byte for byte, whatever happens meanwhile."""

import ctypes
import filecmp
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from dreamreader._register import native
from dreamreader.errors import InvalidInput
from dreamreader.harvest.layout import Moment, SiteLayout
from dreamreader.harvest.reference import ReferenceWriter
from dreamreader.harvest.writer import NativeWriter, open_writer
from tests.harvest.conftest import fill

RUN = "0" * 64
SAMPLES = pa.table({"id": ["a", "b"], "seed": [0, 1]})
MOMENTS = [Moment(n, 0, 900.0 - n, 1.0 / (n + 1), n / 3) for n in range(3)]
WIDE = SiteLayout("wide", 1024, torch.float32, torch.float32)

needs_native = pytest.mark.skipif(native()[0] is None, reason="the native module is not built")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = needs_native


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., NativeWriter]]:
    """Opens native writers, with few threads and little memory, and closes them."""
    writers: list[NativeWriter] = []

    def writer(name: str = "store", *, slow: int = 0, **options) -> NativeWriter:
        options = {"ring_bytes": 1 << 18, "threads": 2, "pressure": "block"} | options
        leave_out = options["pressure"] == "sample"
        module = native()[0]
        assert module
        core = module.ShardWriter(
            options["ring_bytes"], 4 << 20, options["threads"], 1, leave_out, slow
        )
        writers.append(NativeWriter(tmp_path / name, RUN, core))
        return writers[-1]

    yield writer
    for each in writers:
        each.close()


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


@contextmanager
def mounted(kind: str, folder: Path, *options: str) -> Iterator[Path]:
    """A file system of this kind, where we may mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", kind, *options, "none", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"{kind} cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_small_store_is_that_of_the_reference(make, written, stored: torch.dtype):
    writer = make()
    fill(writer, stored=stored)
    assert len(same_files(writer.shards, written("plain", stored=stored) / "shards")) == 8


@pytest.mark.parametrize("pool", ["none", "mean", "max"])
@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_slabs_are_cut_anywhere(make, tmp_path: Path, stored: str, minus: bool, pool: str):
    """Rows of odd sizes over many slabs, several puts to a moment, strided and not finite x."""
    layouts = [
        SiteLayout("a:b", 333, getattr(torch, stored), torch.bfloat16, pool=pool),
        SiteLayout("b", 5, getattr(torch, stored), torch.float64, pool=pool),
    ]
    writer, plain = make(), ReferenceWriter(tmp_path / "plain", RUN)
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


def test_more_sites_than_slabs(make, tmp_path: Path):
    """Sites that become known in a unit share slabs; from the next unit on each has its own."""
    layouts = [SiteLayout(f"site{n}", 50 + n, torch.float32, torch.float32) for n in range(24)]
    writer, plain = make(ring_bytes=1 << 20), ReferenceWriter(tmp_path / "plain", RUN)
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


def test_a_sealed_shard_is_a_safetensors_file(make, tmp_path: Path):
    writer = make()
    layout = SiteLayout("s", 300, torch.float32, torch.float32)
    unit(writer, layout=layout, puts=3, count=100)
    found = load_file(writer.shards / "000000" / "s.safetensors")
    for n in range(3):
        x, places, keys = rows_of(layout, 100, n, n)
        entry, token = places.long().unbind(1)
        assert torch.equal(found["values"][100 * n : 100 * n + 100], x[entry, token])
        assert torch.equal(found["keys"][100 * n : 100 * n + 100], keys)
    assert found["segments"][:, 3].sum() == 300 and found["moments"].shape == (3, 7)


def test_only_whole_units_can_be_seen(make):
    writer = make()
    site = writer.site(WIDE)
    writer.begin(3)
    for n in range(10):
        writer.put(site, *rows_of(WIDE, 40, n))
        assert all(path.name.startswith(".") for path in writer.shards.iterdir())
    writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert [path.name for path in writer.shards.iterdir()] == ["000003"]
    writer.begin(4)
    writer.put(site, *rows_of(WIDE, 40))
    writer.abandon()
    assert [path.name for path in writer.shards.iterdir()] == ["000003"]
    unit(writer, 4)
    assert sorted(path.name for path in writer.shards.iterdir()) == ["000003", "000004"]


def test_a_put_without_rows_writes_nothing(make, tmp_path: Path):
    for each in (make(), ReferenceWriter(tmp_path / "plain", RUN)):
        site = each.site(WIDE)
        each.begin(0)
        assert each.put(site, *rows_of(WIDE, 0)) == 0
        assert each.seal(SAMPLES, MOMENTS, ["cond"]) == []


def test_a_slow_disk_makes_put_wait(make, tmp_path: Path):
    writer, plain = make(slow=5000), ReferenceWriter(tmp_path / "plain", RUN)
    assert unit(writer) == unit(plain) == 240
    assert writer.info["waits"] > 0
    same_files(writer.shards, plain.shards)


def test_a_slow_disk_may_leave_rows_out(make):
    """A put is kept whole or not at all, and every row that is not there is counted."""
    writer = make(slow=20_000, pressure="sample", threads=1)
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


def test_a_site_of_which_all_was_left_out_is_written(make):
    writer = make(slow=300_000, pressure="sample", threads=1, ring_bytes=1 << 17)
    late = SiteLayout("late", 1024, torch.float32, torch.float32)
    first, second = writer.site(WIDE), writer.site(late)
    writer.begin(0)
    writer.put(first, *rows_of(WIDE, 16))
    assert writer.put(second, *rows_of(late, 40, moment=1)) == 0
    shards = writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert [(each.site.name, each.rows) for each in shards] == [("wide", 16), ("late", 0)]
    found = load_file(writer.shards / "000000" / "late.safetensors")
    assert found["values"].shape == (0, 1024) and found["moments"][:, 5].tolist() == [0, 40, 0]


def test_threads_write_while_python_is_held(make):
    """The lock of Python is held all the time in which the slabs are written."""
    writer = make(slow=15_000, threads=1, ring_bytes=1 << 19)
    site = writer.site(WIDE)
    writer.begin(0)
    writer.put(site, *rows_of(WIDE, 110))
    file = next(writer.shards.glob(".*/*.safetensors"))
    before = file.stat().st_size
    ctypes.PyDLL(None).usleep(400_000)
    after = file.stat().st_size
    whole = 110 * WIDE.row_bytes - writer.info["slab_bytes"]  # the last slab is still open
    assert before < whole < after


def test_after_the_first_unit_nothing_is_allocated(make):
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
    writer = make()
    unit(writer, 0)
    grown = writer.info["grown"]
    puts = [rows_of(WIDE, 40, n, n % 3) for n in range(6)]
    site = writer.site(WIDE)
    writer.begin(1)
    writer.put(site, *puts[0])
    tracemalloc.start()
    before = module.mallinfo2().uordblks + module.mallinfo2().hblkhd
    for put in puts[1:]:
        writer.put(site, *put)
    after = module.mallinfo2().uordblks + module.mallinfo2().hblkhd
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert writer.info["grown"] == grown
    assert after - before < 4096 and python < 4096  # less than a row


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_error_of_the_disk_comes_with_its_reason(make, tmp_path: Path):
    """While the rows are put, and at the end; then the writer goes on with the unit anew."""
    writer, plain = make(), ReferenceWriter(tmp_path / "plain", RUN)
    site = writer.site(WIDE)
    writer.begin(0)
    with file_limit(200_000), pytest.raises(InvalidInput, match="would exceed the size limit"):
        for n in range(1000):
            writer.put(site, *rows_of(WIDE, 40, n))
    writer.abandon()
    assert list(writer.shards.iterdir()) == []
    writer.begin(0)
    writer.put(site, *rows_of(WIDE, 20))
    with file_limit(50_000), pytest.raises(InvalidInput, match="would exceed the size limit"):
        writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert [path.name[0] for path in writer.shards.iterdir()] == ["."]
    writer.abandon()
    unit(writer)
    unit(plain)
    same_files(writer.shards, plain.shards)


def test_a_full_disk(make, tmp_path: Path):
    with mounted("tmpfs", tmp_path / "store", "-o", "size=2m"):
        writer = make("store")
        site = writer.site(WIDE)
        writer.begin(0)
        with pytest.raises(InvalidInput, match="the disk is full; what was finished is kept"):
            for n in range(1000):
                writer.put(site, *rows_of(WIDE, 40, n))
        with pytest.raises(InvalidInput, match="the disk is full"):
            writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
        writer.abandon()
        assert unit(writer) == 240
        writer.close()


def test_a_file_system_without_direct_writes(make, tmp_path: Path):
    plain = ReferenceWriter(tmp_path / "plain", RUN)
    unit(plain)
    with mounted("ramfs", tmp_path / "store"):
        writer = make("store")
        unit(writer)
        assert writer.info["direct"] is False
        same_files(writer.shards, plain.shards)
        writer.close()


def test_a_folder_that_is_gone(make):
    writer = make()
    site = writer.site(WIDE)
    writer.begin(0)
    shutil.rmtree(writer.shards)
    with pytest.raises(InvalidInput, match="cannot be written: No such file"):
        writer.put(site, *rows_of(WIDE, 4))


KILLED = """
import sys
import threading
from pathlib import Path
from tests.harvest.test_writer import WIDE, open_writer, rows_of, unit
writer = open_writer(Path(sys.argv[1]), "0" * 64, ring_bytes=1 << 18)
unit(writer)
site = writer.site(WIDE)
writer.begin(1)
n = 0
while True:
    writer.put(site, *rows_of(WIDE, 40, n % 7))
    n += 1
    if n == 20:
        print("writing", flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_units_only(make, tmp_path: Path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert child.stdout and child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    shards = tmp_path / "store" / "shards"
    names = sorted(path.name for path in shards.iterdir())
    assert len(names) == 2 and names[0].startswith(".000001.") and names[1] == "000000"
    plain = ReferenceWriter(tmp_path / "plain", RUN)
    unit(plain)
    same_files(shards / "000000", plain.shards / "000000")
    writer = make()
    unit(writer, 1)
    assert (shards / "000001" / "unit.json").exists()


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_end_with_the_writer(make, tmp_path: Path):
    before = thread_count()
    writer = make(threads=5)
    unit(writer)
    assert thread_count() == before + 5
    writer.begin(1)
    writer.put(0, *rows_of(WIDE, 40))
    writer.close()
    writer.close()
    assert thread_count() == before and sorted(p.name for p in writer.shards.iterdir()) == [
        "000000"
    ]
    with pytest.raises(ValueError, match="it is closed"):
        writer.site(SiteLayout("new", 4, torch.float32, torch.float32))
    forgotten = open_writer(tmp_path / "other", RUN, ring_bytes=1 << 18, threads=3)
    forgotten.begin(0)
    forgotten.put(forgotten.site(WIDE), *rows_of(WIDE, 40))
    assert thread_count() == before + 3
    del forgotten
    gc.collect()
    assert thread_count() == before


# Python 3.12 and later warn of forks beside threads, which is what this test is about.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_has_no_writer_and_leaves_ours_alone(make, tmp_path: Path):
    writer, plain = make(), ReferenceWriter(tmp_path / "plain", RUN)
    site = writer.site(WIDE)
    writer.begin(0)
    puts = [rows_of(WIDE, 40, n, n % 3) for n in range(6)]
    for n, put in enumerate(puts):
        if n == 3:
            child = os.fork()
            if child == 0:
                try:
                    writer.put(site, *put)
                except RuntimeError as error:
                    told = "open a writer in it" in str(error)
                    writer.close()
                    os._exit(0 if told else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        writer.put(site, *put)
    writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    unit(plain)
    same_files(writer.shards, plain.shards)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_during_a_call_does_not_wait_for_it(make):
    writer = make(slow=500_000)
    site = writer.site(WIDE)
    writer.begin(0)
    writer.put(site, *rows_of(WIDE, 4))
    sealing = threading.Thread(target=writer.seal, args=(SAMPLES, MOMENTS, ["cond", "uncond"]))
    sealing.start()
    time.sleep(0.1)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        try:
            writer._core.used()
        except RuntimeError as error:
            os._exit(0 if "open a writer in it" in str(error) else 1)
        finally:
            os._exit(2)
    assert sealing.is_alive()
    sealing.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_calls_of_several_threads_come_one_after_the_other(make):

    writer = make(slow=500)
    layouts = [SiteLayout(f"s{n}", 200 + n, torch.float32, torch.float32) for n in range(3)]
    numbers = [writer.site(layout) for layout in layouts]
    writer.begin(0)

    def run(number: int) -> None:
        for n in range(20):
            writer.put(numbers[number], *rows_of(layouts[number], 30, n))

    workers = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    shards = writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    assert [each.rows for each in shards] == [600] * 3
    for layout in layouts:
        found = load_file(writer.shards / "000000" / layout.file)["values"]
        for n in range(20):
            x, places, _ = rows_of(layout, 30, n)
            entry, token = places.long().unbind(1)
            assert torch.equal(found[30 * n : 30 * n + 30], x[entry, token])


WRONG = {
    "a place is outside x": {"places": torch.full((4, 2), 16).int()},
    "places must be dense int32": {"places": torch.zeros(4, 2).long()},
    "keys must be dense int32": {"keys": torch.zeros(4, 3).int()},
    "as many places as keys": {"places": torch.zeros(5, 2).int()},
    "the rows of one put have one moment": {"keys": torch.arange(16).reshape(4, 4).int()},
    "x has other features": {"x": torch.zeros(8, 16, 1023)},
    "no kernel for a tensor": {"x": torch.zeros(8, 16, 1024).int()},
    "x and minus differ in shape": {"minus": torch.zeros(8, 15, 1024)},
    "x and minus differ in type": {"minus": torch.zeros(8, 16, 1024).double()},
    "groups are for sites with a pool": {"groups": torch.arange(5).int()},
    "groups must be": {"groups": torch.arange(4).int()},
    "a group without a place": {"groups": torch.tensor([0, 1, 1, 3, 4]).int()},
    "groups must go from 0": {"groups": torch.tensor([0, 1, 2, 3, 5]).int()},
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_rows_are_refused_and_leave_no_trace(make, text: str):
    writer = make()
    site = writer.site(WIDE)
    writer.begin(0)
    x, places, keys = rows_of(WIDE, 4)
    arguments = {"x": x, "places": places, "keys": keys} | WRONG[text]
    with pytest.raises(ValueError, match=text):
        writer.put(site, **arguments)
    assert writer.put(site, x, places, keys) == 4
    assert writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])[0].rows == 4


def test_memory_for_two_rows_is_the_least(make):
    small = make(ring_bytes=4096)
    small.site(WIDE)
    with pytest.raises(ValueError, match="ring_bytes must be at least 131072 for these sites"):
        small.begin(0)
    late = make("late")
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
    with pytest.raises(InvalidInput, match="threads=0: both must be positive"):
        open_writer(tmp_path, RUN, threads=0)


def test_a_closed_unit_is_done_in_time(make):
    """Dropping a unit does not wait until what is in memory is written."""
    writer = make(slow=50_000, threads=1, ring_bytes=1 << 20)
    site = writer.site(WIDE)
    writer.begin(0)
    writer.put(site, *rows_of(WIDE, 200))
    begun = time.perf_counter()
    writer.abandon()
    assert time.perf_counter() - begun < 0.3
    assert np.isclose(writer.info["written"], 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_rows_of_a_gpu_arrive_in_order(tmp_path: Path):
    """The CUDA code itself, with streams that are threads and take their time."""
    source = Path(__file__).parents[1] / "twin" / "capture.cpp"
    csrc = source.parents[2] / "csrc"
    folders = [source.parent / "streams", csrc, csrc / "capture"]
    flags = "-std=c++20 -O1 -DDREAMREADER_CUDA=1 -Wall -Wextra -Werror -pthread".split()
    program = tmp_path / "capture"
    command = ["g++", *flags, *(f"-I{each}" for each in folders), str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
def test_rows_of_a_gpu_are_those_of_the_reference(tmp_path: Path, stored: torch.dtype):
    layout = SiteLayout("wide", 1024, stored, torch.bfloat16)
    names = {"gpu": open_writer(tmp_path / "gpu", RUN, device="cuda"), "cpu": None}
    names["cpu"] = ReferenceWriter(tmp_path / "cpu", RUN)
    for name, writer in names.items():
        site = writer.site(layout)
        for number in range(2):
            writer.begin(number)
            for n in range(40):
                x, places, keys = rows_of(layout, 400, 100 * number + n, n % 3)
                writer.put(site, x.cuda() if name == "gpu" else x, places, keys)
            writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
        writer.close()
    assert len(same_files(tmp_path / "gpu", tmp_path / "cpu")) == 6


@needs_gpu
@pytest.mark.gpu
def test_a_put_from_a_gpu_neither_waits_nor_allocates_after_the_first_unit(tmp_path: Path):
    writer = open_writer(tmp_path, RUN, device="cuda")
    layout = SiteLayout("wide", 1024, torch.bfloat16, torch.bfloat16)
    site, puts = writer.site(layout), [rows_of(layout, 400, n, n % 3) for n in range(40)]
    puts = [(x.cuda(), places, keys) for x, places, keys in puts]
    for number in range(2):
        writer.begin(number)
        free = torch.cuda.mem_get_info()[0]
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            for each in puts:
                writer.put(site, *each)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert number == 0 or torch.cuda.mem_get_info()[0] == free
        writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    writer.close()
