"""Opening a store whose index describes a billion rows, and what one of its rows costs.

    python benchmarks/store_scale.py [--rows 1000000000] [--shards 10000] [--segments 1000000]

Simulated: the large store has a manifest and an index, and no shards; its index is made by the
code that indexes real ones, from headers that exist in memory only. It is opened in a process of
its own, whose memory is what the kernel says, beside what it had after its imports. Measured on
real files: stores of 1e5 to 1e7 short rows are written, indexed and verified, and what one row
costs must not grow with their number; shuffling (the place of a row in the order of an epoch, and
the shard that has it) is timed on indexes of 1e5 to 1e9 rows. Nothing is written unless the
segments of the large store sum to its rows and the real stores verify.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from paired import environment, write

from dreamreader.ops import permuted
from dreamreader.store.index import Index, save_index, table_of, write_index
from dreamreader.store.layout import Moment, SiteLayout, tensors_of
from dreamreader.store.manifest import Job, Manifest
from dreamreader.store.shard import ShardFile
from dreamreader.store.verify import verify
from dreamreader.store.writer import open_writer

RUN = "0" * 64
SITES = [
    SiteLayout(f"unet.block.{n}.attn2", 1280, torch.bfloat16, torch.bfloat16) for n in range(10)
]
STEPS, BRANCHES = 50, ("cond", "uncond")
REAL = (100_000, 1_000_000, 10_000_000)  # rows
SHUFFLED = (10**5, 10**6, 10**7, 10**8, 10**9)
ASKED = 1_000_000  # rows of each whose places are asked for
UNIT, RUN_ROWS, WIDTH = 100_000, 1000, 16  # of the real stores
GOALS = {"open": 2.0, "first_shuffled_batch": 1.0, "megabytes": 300.0}

OPEN = """
import json, sys, time

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(name))

import torch, numpy, pyarrow.parquet, dreamreader.store.store as stores
from dreamreader.store import StoreDataset
from dreamreader.ops import permuted
before = memory("VmRSS")
begun = time.perf_counter()
store = stores.Store(sys.argv[1])
opened = time.perf_counter()
rows, size = store.rows, store.nbytes
asked = time.perf_counter()
sites = [store.segments(site) for site in store.sites]
whole = time.perf_counter()
one = store.segments(next(iter(store.sites)), steps=range(0, 50, 7), branch="cond")
chosen = time.perf_counter()
dataset = StoreDataset(store, next(iter(store.sites)), batch_size=4096, branch="cond")
picked = dataset._picked
run, within = picked.runs_of(permuted(numpy.arange(4096), picked.total, 1))
plan = picked.file[run], picked.first[run] + within
end = time.perf_counter()
print(json.dumps({
    "rows": rows, "bytes": size, "segments": sum(each.total for each in sites),
    "chosen": one.total, "seconds": {"open": opened - begun, "count": asked - opened,
    "segments_of_all_sites": whole - asked, "segments_of_a_selection": chosen - whole,
    "first_shuffled_batch": end - chosen},
    "megabytes": {"imported": before, "peak": memory("VmHWM"), "after": memory("VmRSS")},
}))
"""


def simulate(folder: Path, rows: int, shards: int, segments: int) -> float:
    """Writes index and manifest of a store that is not there; seconds to make the index."""
    begun = time.perf_counter()
    table = table_of(list(headers(rows, shards, segments)))
    seconds = time.perf_counter() - begun
    units = range(shards // len(SITES))
    folder.mkdir(parents=True)
    save_index(folder, Index(table, {site.name: site for site in SITES}, units))
    Manifest((Job(RUN, (0, len(units))),), complete=True).write(folder)
    return seconds


def headers(rows: int, shards: int, segments: int) -> Iterator[tuple[int, ShardFile]]:
    """Shards as `open_shard` gives them, without files: all sites, steps and branches."""
    each, runs = rows // shards, segments // shards
    moments = np.array([[n, 0, 999 - 20 * n, 1.0, n / STEPS, 0, 0] for n in range(STEPS)])
    number = np.arange(runs)
    first = number * each // runs
    table = [number // 2 % STEPS, number % 2, first, np.diff(first, append=each)]
    for shard in range(shards):
        unit, site = shard // len(SITES), SITES[shard % len(SITES)]
        at = tensors_of(site, each, runs, STEPS)
        path = Path(f"{unit:06d}") / site.file
        columns = np.column_stack(table).astype(np.int32)
        yield unit, ShardFile(path, site, RUN, BRANCHES, each, at, columns, moments)


def opened(folder: Path) -> dict[str, Any]:
    """What opening costs in a fresh process."""
    call = [sys.executable, "-c", OPEN, str(folder)]
    found = subprocess.run(call, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def shuffled(rows: int) -> float:
    """Nanoseconds to find the shard and the row of a place in the order of an epoch."""
    runs = max(rows // RUN_ROWS, 1)
    start = np.linspace(0, rows, runs + 1).astype(np.int64)
    best = float("inf")
    for begin in range(3):
        begun = time.perf_counter()
        places = permuted(np.arange(begin, begin + min(ASKED, rows - 3)), rows, 1)
        found = np.searchsorted(start, places, side="right")
        best = min(best, time.perf_counter() - begun)
        if not (found.min() >= 1 and found.max() <= runs):
            raise SystemExit(f"{rows:,} rows: a place lies outside")
    return best / min(ASKED, rows) * 1e9


def real(folder: Path, rows: int) -> float:
    """Writes a store of one site, in units of UNIT rows and segments of RUN_ROWS.

    Returns:
        Nanoseconds that one row took.
    """
    begun = time.perf_counter()
    writer = open_writer(folder, RUN)
    site = SiteLayout("block", WIDTH, torch.bfloat16, torch.bfloat16)
    times = [Moment(step, 0, 999.0 - step, 1.0, step / STEPS) for step in range(STEPS)]
    x = torch.randn(RUN_ROWS, 1, WIDTH)
    place = torch.stack([torch.arange(RUN_ROWS), torch.zeros(RUN_ROWS, dtype=torch.long)], 1)
    for unit in range(rows // UNIT):
        writer.begin(unit)
        for number in range(UNIT // RUN_ROWS):
            where = torch.tensor([number // 2 % STEPS, number % 2]).expand(RUN_ROWS, 2)
            keys = torch.column_stack([torch.zeros(RUN_ROWS), where, torch.arange(RUN_ROWS)])
            writer.put(writer.site(site), x, place.int(), keys.int())
        writer.seal(pa.table({"id": ["0"]}), times, BRANCHES)
    writer.close()
    return (time.perf_counter() - begun) / rows * 1e9


def per_row(folder: Path, rows: int) -> dict[str, float]:
    """Nanoseconds that one row of a real store costs."""
    begun = time.perf_counter()
    table = write_index(folder)
    indexed = time.perf_counter()
    report = verify(folder)
    end = time.perf_counter()
    if not report.holds or report.rows != rows or sum(table["rows"].to_pylist()) != rows:
        raise SystemExit(f"{rows:,} rows: {report}")
    return {"index": (indexed - begun) / rows * 1e9, "verify": (end - indexed) / rows * 1e9}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        large = Path(name) / "large"
        seconds = simulate(large, args.rows, args.shards, args.segments)
        found = [opened(large) for _ in range(args.rounds)]
        if any(each["segments"] != args.rows for each in found):
            raise SystemExit("the segments are not all rows")
        costs = {}
        for rows in REAL:
            folder = Path(name) / str(rows)
            written = real(folder, rows)
            costs[str(rows)] = {"write": written, **per_row(folder, rows)}
    return {
        "benchmark": "store scale",
        "environment": environment(),
        "simulated": {
            "rows": args.rows,
            "shards": args.shards,
            "index_lines": args.segments,
            "seconds_to_make_the_index": seconds,
            "rounds": found,
            "median_seconds": {
                name: statistics.median(each["seconds"][name] for each in found)
                for name in found[0]["seconds"]
            },
            "added_megabytes": statistics.median(
                each["megabytes"]["peak"] - each["megabytes"]["imported"] for each in found
            ),
        },
        "measured": {"row_bytes": WIDTH * 2 + 20, "nanoseconds_per_row": costs},
        "shuffle_nanoseconds_per_row": {str(rows): shuffled(rows) for rows in SHUFFLED},
        "goals": GOALS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**4)
    parser.add_argument("--segments", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="store-scale", help="name, or path of a JSON file")
    args = parser.parse_args()
    result = measure(args)
    print(
        json.dumps(
            {key: result[key] for key in ("simulated", "measured", "shuffle_nanoseconds_per_row")},
            indent=1,
        )
    )
    print(write(result, Path(args.out) if args.out.endswith(".json") else args.out))


if __name__ == "__main__":
    main()
