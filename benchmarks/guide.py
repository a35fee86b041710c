"""Guidance by a probe, beside autograd of the same and beside its gradient written by hand.

    python benchmarks/guide.py [--rows 8192] [--width 1280] [--hidden 128] [--steps 1 5 10]

Both baselines are plain torch on the same rows: autograd for the rows alone (the probe takes no
gradients), and the chain rule written out with products and masks. Nothing is printed or written
unless what they and the kernel give is that of float64, but for the few rows in which rounding
decides whether a unit at zero is active.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write
from torch import Tensor

from dreamreader.ops import guide, guide_reference

GOAL = 3.0  # times the speed of autograd
STRENGTH, LABELS = 0.1, 8
ODD_ROWS = 5e-3  # share of rows in which a unit may have switched; 1e-3 in the float32 reference


class Job:
    """Rows, a probe with two hidden layers, and everything that is timed."""

    def __init__(self, rows: int, width: int, hidden: int, steps: int, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        sizes = [width, hidden, hidden, LABELS]
        self.x = torch.randn(1, rows, width, generator=g).to(dtype)
        self.weights = [
            torch.randn(o, i, generator=g) / i**0.5
            for i, o in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        self.biases = [torch.randn(o, generator=g) * 0.1 for o in sizes[1:]]
        self.c = torch.zeros(LABELS)
        self.c[:3] = torch.tensor([-1.0, 0.5, 0.5])
        self.steps = steps
        self.flops = 2 * rows * hidden * (2 * width + 2 * hidden * steps + hidden * (steps - 1))

    def kernel(self) -> Tensor:
        return guide(self.x, self.weights, self.biases, self.c, STRENGTH, iterations=self.steps)

    def autograd(self) -> Tensor:
        h = self.x.float()
        for _ in range(self.steps):
            h = h.detach().requires_grad_()
            z = h
            for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                z = torch.nn.functional.linear(z, weight, bias)
                z = torch.relu(z) if n + 1 < len(self.weights) else z
            (gradient,) = torch.autograd.grad((z * self.c).sum(), h)
            with torch.no_grad():
                h = h - STRENGTH * gradient
        return h.to(self.x.dtype)

    def by_hand(self) -> Tensor:
        first, second, last = self.weights
        h, head = self.x[0].float(), self.c @ last
        for _ in range(self.steps):
            a = torch.addmm(self.biases[0], h, first.T)
            b = torch.addmm(self.biases[1], torch.relu(a), second.T)
            u = torch.where(b > 0, head, 0.0) @ second
            h = torch.addmm(h, torch.where(a > 0, u, 0.0), first, alpha=-STRENGTH)
        return h.unsqueeze(0).to(self.x.dtype)

    def problems(self) -> list[str]:
        """In words, what does not give what float64 gives."""
        weights, (first, *rest) = (
            [each.double() for each in layers] for layers in (self.weights, self.biases)
        )
        biases, c = [first.reshape(1, 1, -1), *rest], self.c.double()[None]
        s = torch.full(self.x.shape[:2], STRENGTH, dtype=torch.float64)
        exact = guide_reference(
            self.x.double(), weights, biases, "relu", c, s, 1.0, self.steps, torch.inf
        )
        forms = ("kernel", "autograd", "by_hand")
        wrong = {name: wrong_rows(getattr(self, name)(), exact) for name in forms}
        return [
            f"{name}, {self.steps} steps: {int(rows.sum())} rows are wrong"
            for name, rows in wrong.items()
            if float(rows.double().mean()) > ODD_ROWS
        ]

    def measured(self, rounds: int) -> dict[str, Any]:
        calls = {"kernel": self.kernel, "autograd": self.autograd, "by_hand": self.by_hand}
        times, left_out = interleaved(calls, rounds)
        seconds = {name: summary(each) for name, each in times.items()}
        return {
            "steps": self.steps,
            "dtype": str(self.x.dtype).removeprefix("torch."),
            "milliseconds": {name: each["median"] * 1e3 for name, each in seconds.items()},
            "gigaflops": self.flops / seconds["kernel"]["median"] / 1e9,
            "speedup": {
                name: summary(times[name], times["kernel"]) for name in ("autograd", "by_hand")
            },
            "rounds_left_out": left_out,
        }


def wrong_rows(got: Tensor, exact: Tensor) -> Tensor:
    """Which rows are not what float64 gives, up to rounding; a unit at its kink makes a row odd."""
    slack = 2 * torch.finfo(got.dtype).eps * float(exact.abs().max()) + 1e-5
    return ((got.double() - exact).abs() > slack).any(-1)


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    sizes = options.width, options.hidden
    jobs = [(steps, getattr(torch, dtype)) for dtype in options.dtypes for steps in options.steps]
    found = [one for each in jobs for one in Job(512, *sizes, *each).problems()]
    if found:
        print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
        return 1
    rows = [Job(options.rows, *sizes, *each).measured(options.rounds) for each in jobs]
    result = {
        "benchmark": "guide",
        "environment": environment(),
        "sizes": {"rows": options.rows, "width": options.width, "hidden": options.hidden},
        "labels": LABELS,
        "rounds": options.rounds,
        "rows": rows,
        "goal": GOAL,
    }
    for row in rows:
        show(row)
    if options.write:
        print(write(result, options.output or "guide"))
    return 0


def show(row: dict[str, Any]) -> None:
    ratios = ", ".join(
        f"{name} {each['median']:.2f} [{each['q20']:.2f}, {each['q80']:.2f}]"
        for name, each in row["speedup"].items()
    )
    print(
        f"{row['steps']:2d} steps {row['dtype']:8s} {row['milliseconds']['kernel']:7.1f} ms  "
        f"{row['gigaflops']:5.0f} GFLOP/s   faster than: {ratios}"
        + ("   too few quiet rounds" if row["rounds_left_out"] == -1 else "")
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--hidden", type=int, default=128, help="of each of two layers")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10], help="inner steps")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--output", type=Path, help="file to write instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
