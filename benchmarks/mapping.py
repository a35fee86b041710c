"""What maps between models cost: their moments beside bare products, and applying one in a hook.

    python benchmarks/mapping.py [--rows 1000000] [--widths 1280 256] [--part 32768] [--rounds 15]

The first part streams rows into the moments that ridge is solved from, all of them part by part
beside the bare products X'X and X'Y of the same rows in float64, in which moments are summed; the
rows of the bare products are float64 already, those of the moments are not. A part is a round: a
million rows are 31 of them. Memory is the peak of the process over its memory before the first row,
after one part and after all. The second part times a layer whose output a hook replaces by
`map.apply`, beside the same hook with the bare product. No time is printed unless the results
agree. About four minutes on two cores.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write
from torch import Tensor, nn
from torch.nn.functional import linear

from dreamreader.mapping import AffineMap, CrossMoments, fit_map

GOALS = {"moments": 1.3, "apply": 1.1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"large": (4096, 1280, 1280), "small": (512, 96, 80)}  # rows, and features of both sides


class Stream:
    """Rows of both sides in parts, each added to moments and, by itself, multiplied plainly."""

    def __init__(self, width: int, part: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(part, width, generator=generator)
        mix = torch.randn(width, width, generator=generator) / width**0.5
        self.y = (self.x @ mix + torch.randn(part, width, generator=generator)).to(dtype)
        self.x = self.x.to(dtype)
        self.wide = self.x.double(), self.y.double()
        self.sums = torch.zeros(2, width, width, dtype=torch.float64)
        self.moments = CrossMoments(width, width)
        self.parts = 0

    def bare(self) -> None:
        x, y = self.wide
        self.sums[0].addmm_(x.T, x)
        self.sums[1].addmm_(x.T, y)

    def ours(self) -> None:
        self.moments.add(self.x, self.y)
        self.parts += 1

    def wrong(self) -> bool:
        """Whether the moments of a part are not those of two passes."""
        found = CrossMoments(self.x.shape[1], self.y.shape[1])
        found.add(self.x, self.y)
        x, y = (each - each.mean(0) for each in self.wide)
        pairs = (found.source_scatter, x.T @ x), (found.cross_scatter, x.T @ y)
        return not all(torch.allclose(a, b, rtol=1e-9, atol=1e-6) for a, b in pairs)


class Hooked:
    """A layer whose output a forward hook replaces."""

    def __init__(self, rows: int, d_source: int, d_target: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Identity()
        self.x = torch.randn(2, rows // 2, d_source, generator=generator).to(dtype)
        weight = torch.randn(d_target, d_source, generator=generator) / d_source**0.5
        bias = torch.randn(d_target, generator=generator)
        self.map = AffineMap(torch.zeros(d_source), weight, bias)
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)

    def run(self, hook: Callable[[Any, Any, Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            handle = self.layer.register_forward_hook(hook)
            try:
                return self.layer(self.x)
            finally:
                handle.remove()

        return call

    def calls(self, repeats: int) -> dict[str, Callable[[], Any]]:
        each = {
            "bare": self.run(lambda m, i, x: linear(x, self.weight, self.bias)),
            "ours": self.run(lambda m, i, x: self.map.apply(x)),
        }
        if not torch.equal(each["bare"](), each["ours"]()):
            raise SystemExit("no times: a map does not give what the bare product gives")
        return {name: repeated(call, repeats) for name, call in each.items()}


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def stream(options: argparse.Namespace, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds and memory of moments of all rows, and seconds of ridge from them."""
    own = Stream(width, options.part, dtype)
    if own.wrong():
        raise SystemExit(f"no times: moments of {dtype} rows are not those of two passes")
    own.bare()
    forget_peak()
    before = peak()
    own.ours()
    memory = {"first_megabytes": (peak() - before) / 2**20}
    calls = {"bare": own.bare, "ours": own.ours}
    parts = max(-(-options.rows // options.part) - 1, 1)  # one was added for its memory
    times, left_out = interleaved(calls, parts, parts)
    memory["all_megabytes"] = (peak() - before) / 2**20
    solved, _ = interleaved({"solve": lambda: fit_map(own.moments, "ridge", lambdas=1e-4)}, 1, 1)
    return {
        "rows": own.moments.rows,
        "rounds": len(times["ours"]),
        "left_out": left_out,
        "rows_per_second": {
            name: options.part / summary(each)["median"] for name, each in times.items()
        },
        "ratio": summary(times["ours"], times["bare"]),
        "solve_seconds": solved["solve"][0],
        **memory,
    }


def applied(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of a hook with each, by size and dtype."""
    found = []
    for size, (rows, d_source, d_target) in SIZES.items():
        for name, dtype in DTYPES.items():
            own = Hooked(rows, d_source, d_target, dtype)
            repeats = 2 if size == "large" else 200
            times, left_out = interleaved(own.calls(repeats), options.rounds)
            scaled = {each: [1e6 * t / repeats for t in own] for each, own in times.items()}
            row = {"size": size, "rows": rows, "widths": [d_source, d_target], "dtype": name}
            micro = {each: summary(values) for each, values in scaled.items()}
            ratio = summary(times["ours"], times["bare"])
            found.append(row | {"microseconds": micro, "ratio": ratio, "left_out": left_out})
    return found


def forget_peak() -> None:
    """From here on `peak` is that of what comes."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that the process has had in memory since."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024  # pyright: ignore


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        moments = [
            {"width": width, "dtype": name, **stream(options, width, DTYPES[name])}
            for width in options.widths
            for name in options.dtypes
        ]
        result = {
            "benchmark": "mapping",
            "environment": environment(),
            "load": os.getloadavg()[0],
            "part": options.part,
            "apply": applied(options),
            "moments": moments,
            "goals": GOALS,
        }
    show(result)
    if not options.dry:
        print(write(result, options.output or "mapping"))
    return 0


def show(result: dict[str, Any]) -> None:
    for row in result["apply"]:
        d_source, d_target = row["widths"]
        what = f"apply {row['rows']} x {d_source} -> {d_target}, {row['dtype']}"
        taken = row["microseconds"]["ours"]["median"]
        print(f"{what}: {taken:.1f} us, {shown(row['ratio'])}, goal {GOALS['apply']}")
    for own in result["moments"]:
        speed = f"{own['rows_per_second']['ours']:,.0f} rows/s"
        what = f"{own['rows']:,} {own['dtype']} rows of {own['width']}"
        print(f"moments of {what}: {speed}, {shown(own['ratio'])}", end="")
        print(f", goal {GOALS['moments']}; ridge {own['solve_seconds']:.2f} s; memory", end="")
        print(f" {own['first_megabytes']:.0f} MB at first, {own['all_megabytes']:.0f} MB at last")


def shown(ratio: dict[str, float]) -> str:
    q20, median, q80 = ratio["q20"], ratio["median"], ratio["q80"]
    return f"x{median:.3f} [{q20:.3f}, {q80:.3f}] of bare products"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Maps between models, timed.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[1280, 256])
    parser.add_argument("--part", type=int, default=32_768, help="rows that are timed at once")
    parser.add_argument("--rounds", type=int, default=15, help="of applying a map")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
