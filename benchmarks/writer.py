"""Writing activations to a store, beside plain writes of the same bytes to the same file system.

    python benchmarks/writer.py [--folder .] [--gigabytes 2] [--width 3072] [--rounds 5]

One unit of a few sites is written from activations in memory: rows are gathered and converted, and
get keys and checksums. Beside it, in the same rounds:

    raw      the bytes of the same files, with O_DIRECT, from as many threads in blocks of one slab,
             and fsync
    save     safetensors.torch.save_file of the same rows and keys, one file for each site, as it is
    synced   the same and fsync

Processor time of the writer is that of all its threads from the first row to the sealed unit;
`packing` is the share of it that gathering and converting takes, measured alone. Nothing is printed
or written unless the files of a smaller unit are those of the reference.
"""

import argparse
import filecmp
import mmap
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from paired import environment, interleaved, summary, write
from safetensors.torch import save_file
from torch import Tensor

from dreamreader.ops.pack import pack
from dreamreader.store.layout import Moment, SiteLayout
from dreamreader.store.reference import ReferenceWriter
from dreamreader.store.writer import NativeWriter, open_writer

RAW = 0.9  # at least this share of the speed of raw writes
CORES = 0.15  # at most these core seconds for each GB, without packing
SAVE = 3.0  # at least so many times the speed of save_file
MOMENT = [Moment(0, 0, 500.0, 1.0, 0.0)]


class Job:
    """Activations of a few sites, and every way to write them."""

    def __init__(self, folder: Path, options: argparse.Namespace, gigabytes: float):
        g = torch.Generator().manual_seed(0)
        self.folder, self.threads = folder, options.threads
        source, stored = getattr(torch, options.source), getattr(torch, options.stored)
        self.sites = [
            SiteLayout(f"block.{n}", options.width, stored, source) for n in range(options.sites)
        ]
        self.x = torch.randn(4, 1024, options.width, generator=g).to(source)
        entry = torch.arange(4).repeat_interleave(1024)
        token = torch.arange(1024).repeat(4)
        self.places = torch.stack([entry, token], 1).int()
        self.keys = torch.stack([entry, entry * 0, entry * 0, token], 1).int()
        bytes_each = self.sites[0].row_bytes * len(self.places)
        self.puts = max(1, round(gigabytes * 1e9 / bytes_each / len(self.sites)))
        self.block, self.files = 4 << 20, []
        self.cpu: dict[str, list[float]] = {}

    def fill(self, writer: NativeWriter | ReferenceWriter, unit: int) -> None:
        numbers = [writer.site(each) for each in self.sites]
        writer.begin(unit)
        for _ in range(self.puts):
            for number in numbers:
                writer.put(number, self.x, self.places, self.keys)
        table = pa.table({"id": [str(n) for n in range(4)], "seed": list(range(4))})
        writer.seal(table, MOMENT, ["cond"])

    def writer(self, native: NativeWriter) -> None:
        """One unit, timed without opening the writer, which happens once for a store."""
        self.fill(native, 0)
        self.block = native.info["slab_bytes"]
        unit = native.shards / "000000"
        self.files = [each.stat().st_size for each in sorted(unit.glob("*.safetensors"))]
        shutil.rmtree(unit)

    def raw(self) -> None:
        """As many bytes in as many files."""
        buffers = [mmap.mmap(-1, self.block) for _ in range(self.threads)]
        for buffer in buffers:
            buffer.write(os.urandom(1 << 20) * (self.block >> 20) or bytes(self.block))
        work = [
            (n, at, min(self.block, size - at))
            for n, size in enumerate(self.files)
            for at in range(0, size, self.block)
        ]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
        handles = [os.open(self.folder / f"raw{n}", flags) for n in range(len(self.files))]

        def run(thread: int) -> None:
            for n, at, size in work[thread :: self.threads]:
                whole = -(-size // 4096) * 4096
                os.pwrite(handles[n], memoryview(buffers[thread])[:whole], at)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(self.threads)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        for handle, size in zip(handles, self.files, strict=True):
            os.ftruncate(handle, size)
            os.fsync(handle)
            os.close(handle)
        self.clean("raw*")

    def save(self, sync: bool) -> None:
        """The rows as tensors, collected first, as code without a store does."""
        for n, site in enumerate(self.sites):
            rows = [self.gathered(site) for _ in range(self.puts)]
            tensors = {"values": torch.cat(rows), "keys": self.keys.repeat(self.puts, 1)}
            path = self.folder / f"save{n}"
            save_file(tensors, path)
            if sync:
                with open(path, "rb") as written:
                    os.fsync(written.fileno())
        self.clean("save*")

    def gathered(self, site: SiteLayout) -> Tensor:
        entry, token = self.places.long().unbind(1)
        return self.x[entry, token].to(site.stored)

    def clean(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink()

    def counted(self, name: str, call: Callable[[], None]) -> Callable[[], None]:
        """The call, whose processor time is kept."""

        def run() -> None:
            before = os.times()
            call()
            after = os.times()
            spent = after.user + after.system - before.user - before.system
            self.cpu.setdefault(name, []).append(spent)

        return run


def packing(job: Job) -> float:
    """Processor seconds of the packing of one unit, alone: into the memory of a slab."""
    rows, site = len(job.places), job.sites[0]
    out = torch.empty(rows, site.width, dtype=site.stored)
    scales = torch.empty(rows) if site.scaled else None
    before = os.times()
    for _ in range(job.puts * len(job.sites)):
        pack(job.x, job.places, out=out, scales=scales, not_finite=torch.zeros(1).long())
    after = os.times()
    return after.user + after.system - before.user - before.system


def problems(folder: Path, options: argparse.Namespace) -> list[str]:
    """In words, what is not as it must be, in a smaller unit."""
    job = Job(folder, options, 0.02)
    native, plain = open_writer(folder / "a", "0" * 64), ReferenceWriter(folder / "b", "0" * 64)
    if not isinstance(native, NativeWriter):
        return ["the native module is not built"]
    job.fill(native, 0)
    job.fill(plain, 0)
    names = [each.file for each in job.sites]
    ours, theirs = (folder / name / "shards" / "000000" for name in "ab")
    _, other, missing = filecmp.cmpfiles(ours, theirs, names, shallow=False)
    found = [f"{name} is not that of the reference" for name in (*other, *missing)]
    if not native.info["direct"]:
        found.append(f"{folder} refuses O_DIRECT, so there is nothing to compare with")
    native.close()
    return found


def main() -> int:
    options = parse()
    torch.set_num_threads(options.pack_threads)
    folder = Path(tempfile.mkdtemp(prefix="writer-", dir=options.folder))
    try:
        found = problems(folder, options)
        if found:
            print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
            return 1
        result = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    show(result)
    if options.write:
        print(write(result, options.output or "writer"))
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    job = Job(folder, options, options.gigabytes)
    native = open_writer(folder / "store", "0" * 64, threads=options.threads)
    assert isinstance(native, NativeWriter)
    calls = {
        "writer": job.counted("writer", lambda: job.writer(native)),
        "raw": job.counted("raw", job.raw),
        "save": job.counted("save", lambda: job.save(False)),
        "synced": job.counted("synced", lambda: job.save(True)),
    }
    calls["writer"]()
    job.cpu.clear()
    times, left_out = interleaved(calls, options.rounds)
    native.close()
    size = sum(job.files) / 1e9
    cores = {name: [each / size for each in spent] for name, spent in job.cpu.items()}
    return {
        "benchmark": "writer",
        "environment": environment(),
        "gigabytes": size,
        "sites": options.sites,
        "width": options.width,
        "source": options.source,
        "stored": options.stored,
        "block": job.block,
        "writer_threads": options.threads,
        "rounds": len(times["writer"]),
        "rounds_left_out": left_out,
        "seconds": {name: summary(each) for name, each in times.items()},
        "of_raw": summary(times["raw"], times["writer"]),
        "of_save": summary(times["save"], times["writer"]),
        "of_synced": summary(times["synced"], times["writer"]),
        "core_seconds_per_gigabyte": {name: summary(each) for name, each in cores.items()},
        "packing": packing(job) / size,
        "goals": {"of_raw": RAW, "of_save": SAVE, "core_seconds_per_gigabyte": CORES},
    }


def show(result: dict[str, Any]) -> None:
    size, cores = result["gigabytes"], result["core_seconds_per_gigabyte"]
    for name, each in result["seconds"].items():
        print(
            f"{name:7s} {each['median']:.3f} s  {size / each['median']:5.2f} GB/s"
            f"  {cores[name]['median']:.3f} core seconds per GB"
        )
    goals = result["goals"]
    for name in ("of_raw", "of_save", "of_synced"):
        each = result[name]
        goal = f"   goal {goals[name]}" if name in goals else ""
        print(f"{name:9s} {each['median']:.2f} [{each['q20']:.2f}, {each['q80']:.2f}]{goal}")
    spent = cores["writer"]["median"] - result["packing"]
    print(f"without packing {spent:.3f} core seconds per GB   goal {CORES}")
    if result["rounds_left_out"] == -1:
        print("too few quiet rounds: other processes ran, so these figures say little")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to write to")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of one unit")
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--source", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--stored", choices=["float32", "bfloat16", "int8"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="that write")
    parser.add_argument("--pack-threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--output", type=Path, help="file to write instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
