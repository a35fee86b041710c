"""Fitting a direction from a million rows, beside reading the same memory once.

    python benchmarks/directions.py [--rows 1000000] [--features 1280] [--rounds 7]

One tensor far larger than the caches is added chunk by chunk, as a stream would be: difference of
means, variance of every feature, and the rows that are kept out, scored. The plain read is the
faster of a sum and of a dot product with itself over the same memory, in the same rounds. Nothing
is printed or written unless means and variances are those of numpy in float64.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import environment, interleaved, summary, write
from torch import Tensor

from dreamreader.steering import Directions, Fitter

GOAL = 0.7  # at least this share of the speed of a plain read
LABELS = ("red", "blue")


class Job:
    """Labelled rows in memory, and everything that is timed."""

    def __init__(self, rows: int, features: int, chunk: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 2, (rows,), generator=g)
        self.x = torch.empty(rows, features, dtype=dtype)
        delta, block = torch.randn(features, generator=g) * 0.1, min(rows, 16384)
        noise = torch.randn(block, features, generator=g)
        for begin in range(0, rows, block):
            part = self.x[begin : begin + block]
            own = self.labels[begin : begin + block, None].float()
            part.copy_(noise[: len(part)].roll(begin // block, 1) + own * delta + 1.0)
        self.chunk = chunk
        self.flat = [part.view(-1) for part in self.x.split(chunk)]

    def fitter(self) -> Fitter:
        fitter = Fitter(LABELS)
        for part, labels in zip(
            self.x.split(self.chunk), self.labels.split(self.chunk), strict=True
        ):
            fitter.add({"site": part}, labels)
        return fitter

    def fit(self) -> tuple[Directions, Tensor]:
        fitter = self.fitter()
        return fitter.fit(*LABELS), torch.stack([fitter.variance("site", one) for one in LABELS])

    def total(self) -> list[Tensor]:
        return [part.sum() for part in self.flat]

    def dot(self) -> list[Tensor]:
        return [part.dot(part) for part in self.flat]


def problems(features: int) -> list[str]:
    """In words, what is not as it must be, on fewer rows."""
    job = Job(20_000, features, 3000, torch.float32)
    found = []
    fitter = Fitter(LABELS, holdout=0)
    for part, labels in zip(job.x.split(3000), job.labels.split(3000), strict=True):
        fitter.add({"site": part}, labels)
    wide, numbers = job.x.numpy().astype(np.float64), job.labels.numpy()
    for number, label in enumerate(LABELS):
        rows = wide[numbers == number]
        if not np.allclose(fitter.mean("site", label)[0], rows.mean(0), rtol=1e-12, atol=1e-12):
            found.append(f"the mean of {label} is not that of numpy")
        if not np.allclose(fitter.variance("site", label)[0], rows.var(0), rtol=1e-10):
            found.append(f"the variance of {label} is not that of numpy")
    directions, _ = job.fit()
    if not directions.evidence["site"].auc[0] > 0.9:
        found.append("the direction does not separate the rows that were kept out")
    return found


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    found = problems(options.features)
    if found:
        print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
        return 1
    job = Job(options.rows, options.features, options.chunk, getattr(torch, options.dtype))
    calls = {"sum": job.total, "dot": job.dot, "fit": job.fit}
    for call in calls.values():
        call()
    times, left_out = interleaved(calls, options.rounds)
    plain = min(("sum", "dot"), key=lambda name: summary(times[name])["median"])
    speed = summary(times[plain], times["fit"])
    result = {
        "benchmark": "directions",
        "environment": environment(),
        "rows": options.rows,
        "features": options.features,
        "chunk": options.chunk,
        "dtype": options.dtype,
        "gigabytes": job.x.nbytes / 1e9,
        "rounds": len(times["fit"]),
        "rounds_left_out": left_out,
        "seconds": {name: summary(each) for name, each in times.items()},
        "plain_read": plain,
        "speed_of_plain_read": speed,
        "goal": GOAL,
    }
    show(result)
    if options.write:
        print(write(result, options.output or "directions"))
    return 0


def show(result: dict[str, Any]) -> None:
    size, speed = result["gigabytes"], result["speed_of_plain_read"]
    for name, each in result["seconds"].items():
        print(f"{name:4s} {each['median']:.3f} s  {size / each['median']:5.1f} GB/s")
    print(
        f"fit at {speed['median']:.2f} [{speed['q20']:.2f}, {speed['q80']:.2f}] of the speed of "
        f"{result['plain_read']}   goal {result['goal']}"
    )
    if result["rounds_left_out"] == -1:
        print("too few quiet rounds: other processes ran, so these figures say little")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--chunk", type=int, default=65_536, help="rows of one batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--output", type=Path, help="file to write instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
