"""The native writer when disks, processes and threads do not behave."""

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamreader._register import native
from dreamreader.errors import InvalidInput
from dreamreader.store.layout import SiteLayout
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.writer import NativeWriter, open_writer
from tests.store.writing import MOMENTS, RUN, SAMPLES, WIDE, rows_of, same_files, unit

pytestmark = pytest.mark.skipif(native()[0] is None, reason="the native module is not built")


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


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_error_of_the_disk_comes_with_its_reason(native_writer, tmp_path: Path):
    """While the rows are put, and at the end; then the writer goes on with the unit anew."""
    writer, plain = native_writer(), ReferenceWriter(tmp_path / "plain", RUN)
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


def test_a_full_disk(native_writer, tmp_path: Path):
    with mounted("tmpfs", tmp_path / "store", "-o", "size=2m"):
        writer = native_writer("store")
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


def test_a_file_system_without_direct_writes(native_writer, tmp_path: Path):
    plain = ReferenceWriter(tmp_path / "plain", RUN)
    unit(plain)
    with mounted("ramfs", tmp_path / "store"):
        writer = native_writer("store")
        unit(writer)
        assert writer.info["direct"] is False
        same_files(writer.shards, plain.shards)
        writer.close()


def test_a_folder_that_is_gone(native_writer):
    writer = native_writer()
    site = writer.site(WIDE)
    writer.begin(0)
    shutil.rmtree(writer.shards)
    with pytest.raises(InvalidInput, match="cannot be written: No such file"):
        writer.put(site, *rows_of(WIDE, 4))


KILLED = """
import sys
import threading
from pathlib import Path
from dreamreader.store.writer import NativeWriter, open_writer
from tests.store.writing import WIDE, rows_of, unit
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


def test_a_writer_that_is_killed_leaves_whole_units_only(native_writer, tmp_path: Path):
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
    writer = native_writer()
    unit(writer, 1)
    assert (shards / "000001" / "unit.json").exists()


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def test_sizes_that_no_machine_has_are_refused(tmp_path: Path):
    for options, text in (
        ({"ring_bytes": 1 << 60}, "at most 70,368,744,177,664 bytes"),
        ({"ring_bytes": 1 << 70}, "at most 70,368,744,177,664 bytes"),
        ({"threads": 1 << 31}, "and 4,096 threads are possible"),
        ({"ring_bytes": 2.5e8}, "ring_bytes=250000000.0 and threads=2: both must be whole"),
        ({"threads": "two"}, "threads='two': both must be whole numbers"),
    ):
        with pytest.raises(InvalidInput, match=text):
            open_writer(tmp_path, RUN, **options)
    before = thread_count()
    with pytest.raises(MemoryError, match="ring_bytes=70,368,744,177,664: there is not as much"):
        open_writer(tmp_path, RUN, ring_bytes=1 << 46, threads=2)
    assert thread_count() == before


def test_a_unit_that_did_not_begin_takes_no_rows(native_writer):
    """After a ring that is too small, where a row had waited for room for ever."""
    writer = native_writer()
    unit(writer)
    wide = SiteLayout("wider", 1 << 16, torch.float32, torch.float32)
    site = writer.site(wide)
    with pytest.raises(ValueError, match="ring_bytes must be at least"):
        writer.begin(1)
    for number, layout in ((0, WIDE), (site, wide)):
        with pytest.raises(ValueError, match="begin a unit before its rows"):
            writer.put(number, *rows_of(layout, 4))


def test_a_view_with_another_sign_is_stored_as_the_numbers_that_it_stands_for(
    native_writer, tmp_path: Path
):
    x = torch.randn(8, 16, 1024, dtype=torch.complex64).conj().imag
    minus = torch.randn(8, 16, 1024, dtype=torch.complex64).conj().imag
    assert x.is_neg() and minus.is_neg()
    _, places, keys = rows_of(WIDE, 40)
    ours, plain = native_writer(), ReferenceWriter(tmp_path / "plain", RUN)
    for writer in (ours, plain):
        site = writer.site(WIDE)
        writer.begin(0)
        writer.put(site, x, places, keys)
        writer.put(site, x.clone(), places, keys, minus=minus)
        writer.seal(SAMPLES, MOMENTS, ["cond", "uncond"])
    same_files(ours.shards, plain.shards)


def test_memory_for_a_device_is_asked_for_again_when_torch_gave_back_its_own(tmp_path: Path):
    """And where there is no code for the device, rows are packed on the CPU."""
    module = native()[0]
    assert module

    class Core:
        def __init__(self, *errors: Exception):
            self.errors = list(errors)

        def reserve(self, x: torch.Tensor) -> None:
            if self.errors:
                raise self.errors.pop(0)

    x, full = torch.zeros(1), MemoryError("writer: out of memory")
    for errors, reached in (((), True), ((full,), True), ((module.NoCode("no kernel"),), False)):
        assert NativeWriter(tmp_path, RUN, Core(*errors))._reserve(x) is reached
    with pytest.raises(MemoryError, match="writer: out of memory"):
        NativeWriter(tmp_path, RUN, Core(full, full))._reserve(x)


def test_threads_end_with_the_writer(native_writer, tmp_path: Path):
    before = thread_count()
    writer = native_writer(threads=5)
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
def test_a_fork_has_no_writer_and_leaves_ours_alone(native_writer, tmp_path: Path):
    writer, plain = native_writer(), ReferenceWriter(tmp_path / "plain", RUN)
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
def test_a_fork_during_a_call_does_not_wait_for_it(native_writer):
    writer = native_writer(slow=500_000)
    site = writer.site(WIDE)
    during, number = False, 0
    while not during:  # on a busy machine the call may be over before the fork
        writer.begin(number)
        writer.put(site, *rows_of(WIDE, 4))
        sealing = threading.Thread(target=writer.seal, args=(SAMPLES, MOMENTS, ["cond", "uncond"]))
        sealing.start()
        time.sleep(0.1)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                writer._core.used()
            except RuntimeError as error:
                os._exit(0 if "open a writer in it" in str(error) else 1)
            finally:
                os._exit(2)
        during = sealing.is_alive()
        sealing.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        number += 1


def test_calls_of_several_threads_come_one_after_the_other(native_writer):

    writer = native_writer(slow=500)
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
