"""Shuffled batches of a store, beside reading the same bytes in order, HF datasets and SAELens.

    python benchmarks/loader.py [--rows 524288] [--width 1280] [--batch 4096] [--folder DIR]

All read the same half precision rows from the page cache, and all but the plain copy and "stored"
give batches in float32. The copy maps the shards and copies them in order into one buffer for each
thread. HF datasets has a row in each line and an index for its shuffle; SAELens (in an environment
of its own, peers/) has its usual contexts of 128 rows, and mixes what is in its buffer only.
Nothing is printed or written unless every row that came is the one that it says it is.

The first two numbers of every row say where it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import environment, interleaved, summary, write
from torch import Tensor

from dreamreader.store.dataset import StoreDataset
from dreamreader.store.layout import HEADER, Moment, SiteLayout
from dreamreader.store.reference import ReferenceWriter

PEERS = Path(__file__).parent / "peers"
GOALS = {"saelens": 5.0, "datasets": 3.0, "copy": 0.7}
SITE, CONTEXT, TOKENS = "model.layers.0", 128, 1024


class Data:
    """The rows, as a store and as folders of HF datasets."""

    def __init__(self, folder: Path, rows: int, width: int, batch: int):
        self.folder, self.rows, self.width, self.batch = folder, rows, width, batch
        self.unit = min(rows, 65_536)
        noise = torch.randn(self.unit + 1, width, generator=torch.Generator().manual_seed(0))
        self.noise = noise.half()
        if not (folder / "complete").exists():
            self.write_store()
            self.write_arrow("lines", 1)
            self.write_arrow("contexts", CONTEXT)
            (folder / "complete").touch()

    def part(self, unit: int) -> Tensor:
        """float16 [rows of a unit, width]"""
        place = torch.arange(unit * self.unit, min((unit + 1) * self.unit, self.rows))
        rows = self.noise[: len(place)].clone()
        rows[:, 0], rows[:, 1] = (place // 1024).half(), (place % 1024).half()
        return rows

    @property
    def units(self) -> range:
        return range(-(-self.rows // self.unit))

    def write_store(self) -> None:
        import pyarrow as pa

        writer = ReferenceWriter(self.folder / "store", run="0" * 64)
        site = writer.site(SiteLayout(SITE, self.width, torch.float16, torch.float32))
        for unit in self.units:
            rows = self.part(unit)
            number = torch.arange(len(rows))
            keys = torch.stack([number // TOKENS, 0 * number, 0 * number, number % TOKENS], 1)
            places = torch.stack([0 * number, number], 1)
            writer.begin(unit)
            writer.put(site, rows[None], places.int(), keys.int())
            samples = pa.table({"id": list(range(-(-len(rows) // TOKENS)))})
            writer.seal(samples, [Moment(0, 0, 0.0, 0.0, 0.0)], ["cond"])
        writer.close()

    def write_arrow(self, name: str, context: int) -> None:
        """Lists of fixed length for single rows, as SAELens has them for contexts."""
        import pyarrow as pa
        from datasets import Array2D, Dataset, Features, List, Value, concatenate_datasets

        parts = []
        for unit in self.units:
            rows = self.part(unit).numpy()
            if context == 1:
                flat = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self.width)
                features = Features({"x": List(Value("float16"), length=self.width)})
                parts.append(Dataset(pa.table({"x": flat}).cast(features.arrow_schema)))
            else:
                features = Features({"x": Array2D((context, self.width), "float16")})
                shaped = rows.reshape(-1, context, self.width)
                parts.append(Dataset.from_dict({"x": shaped}, features))
        made = concatenate_datasets(parts)
        made.save_to_disk(str(self.folder / name), num_shards=len(self.units))

    def dataset(self, dtype: torch.dtype | None) -> StoreDataset:
        return StoreDataset(self.folder / "store", SITE, batch_size=self.batch, dtype=dtype)

    def lines(self) -> Any:
        from datasets import load_from_disk

        found = load_from_disk(str(self.folder / "lines")).shuffle(seed=0)
        return found.with_format("torch", dtype=torch.float32)


def places_of(batches: Iterator[Tensor]) -> np.ndarray:
    """The place that each row says it has."""
    first = torch.cat([batch[:, :2].float() for batch in batches]).numpy().astype(np.int64)
    return first[:, 0] * 1024 + first[:, 1]


def problems(data: Data, peer: dict[str, Any] | None) -> list[str]:
    """In words, what is not as it must be."""
    found = []
    read = {
        "the loader": places_of(iter(data.dataset(torch.float32))),
        "HF datasets": places_of(each["x"] for each in data.lines().iter(data.batch)),
    }
    for name, places in read.items():
        if not np.array_equal(np.sort(places), np.arange(data.rows)):
            found.append(f"{name} does not give every row once")
        if np.mean(np.abs(np.diff(places)) < data.unit // 8) > 0.1 + 0.25 * data.unit / data.rows:
            found.append(f"{name} does not shuffle over the whole store")
    for batch in data.dataset(torch.float32):
        place = places_of(iter([batch[:1]]))[0]
        own = data.noise[place % data.unit, 2:].float()
        if not torch.equal(batch[0, 2:], own):
            found.append(f"row {place} is not what was written")
    if peer is not None:
        places = np.array(peer["places"]) @ [1024, 1]
        if len(np.unique(places)) != len(places) or places.max() >= data.rows:
            found.append("SAELens gives a row twice")
    return found


def copier(data: Data, threads: int) -> Callable[[], None]:
    """Copies the values of all shards, in order, into one buffer for each thread."""
    size = data.batch * data.width * 2
    files = sorted((data.folder / "store" / "shards").glob("[0-9]*/*.safetensors"))
    maps = [np.memmap(file, np.uint8, "r")[HEADER:] for file in files]
    parts = [
        mapped[at : at + size]
        for unit, mapped in zip(data.units, maps, strict=True)
        for at in range(0, len(data.part(unit)) * data.width * 2, size)
    ]
    buffers = [np.empty(size, np.uint8) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def some(thread: int) -> None:
        for part in parts[thread::threads]:
            buffers[thread][: len(part)] = part

    return lambda: list(pool.map(some, range(threads))).clear()


def ask_saelens(data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Has the peer read a part of the rows: reading all would take minutes."""
    sys.path.insert(0, str(PEERS))
    from run import interpreter

    job = {
        "folder": str(data.folder / "contexts"),
        "column": "x",
        "context": CONTEXT,
        "width": data.width,
        "rows": data.rows,
        "batch": data.batch,
        "buffer": options.buffer,
        "batches": options.peer_batches,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    python = str(interpreter("saelens_store", options.cache))
    command = [python, str(PEERS / "peer_saelens_store.py")]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"saelens failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def emptied(batches: Any) -> None:
    for _ in batches:
        pass


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        data = Data(folder, options.rows, options.width, options.batch)
        peer = None if options.no_peer else ask_saelens(data, options)
        found = problems(data, peer)
        if found:
            print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
            return 1
        stored, wide, lines = data.dataset(None), data.dataset(torch.float32), data.lines()
        calls = {
            "copy": copier(data, options.threads),
            "stored": lambda: emptied(stored),
            "float32": lambda: emptied(wide),
            "datasets": lambda: emptied(lines.iter(data.batch)),
        }
        for call in calls.values():
            call()
        times, left_out = interleaved(calls, options.rounds)
    rates = {name: summary([data.rows / t for t in each]) for name, each in times.items()}
    ratios = {
        "copy": summary(times["copy"], times["stored"]),
        "datasets": summary(times["datasets"], times["float32"]),
    }
    versions = {"datasets": metadata.version("datasets")}
    if peer is not None:
        rows = options.peer_batches * data.batch
        rates["saelens"] = summary([rows / t for t in peer["seconds"]])
        own = rates["float32"]["median"]
        ratios["saelens"] = summary([own * t / rows for t in peer["seconds"]])
        versions |= peer["versions"]
    result = {
        "benchmark": "loader",
        "environment": environment(),
        "peers": versions,
        "rows": data.rows,
        "row_bytes": data.width * 2,
        "batch": data.batch,
        "rounds": len(times["copy"]),
        "rounds_left_out": left_out,
        "rows_per_second": rates,
        "ratio": ratios,
        "goal": GOALS,
    }
    show(result)
    if options.write:
        print(write(result, options.output or "loader"))
    return 0


def show(result: dict[str, Any]) -> None:
    for name, each in result["rows_per_second"].items():
        gigabytes = each["median"] * result["row_bytes"] / 1e9
        print(f"{name:9s} {each['median']:12,.0f} rows/s  {gigabytes:6.2f} GB/s")
    for name, each in result["ratio"].items():
        goal = result["goal"][name]
        print(
            f"{each['median']:.2f} [{each['q20']:.2f}, {each['q80']:.2f}] of the rate of {name}"
            f"   goal {goal}"
        )
    if result["rounds_left_out"] == -1:
        print("too few quiet rounds: other processes ran, so these figures say little")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=524_288, help="a multiple of 65,536")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--buffer", type=int, default=16_384, help="rows that SAELens mixes")
    parser.add_argument("--peer-batches", type=int, default=32, help="that SAELens reads")
    parser.add_argument("--no-peer", action="store_true", help="leave SAELens out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="keep the data here, and use it again")
    default = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dreamreader" / "peers"
    )
    parser.add_argument("--cache", type=Path, default=default, help="environments of the peers")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--output", type=Path, help="file to write instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
