"""Products of sparse codes beside embedding_bag and beside dense matrices.

    python benchmarks/sae_products.py [--rows 1024] [--width 16384] [--k 64] [--d 1280]

`decode` is the decoder of a sparse autoencoder. `backward` is all that its gradient needs: that of
the codes, of decoder and encoder, and of the encoder's bias; dense, three products of matrices that
are mostly 0. `step` is both, dense four of the five products of a training step (the fifth, the
encoder, is the same for both). Dense codes are at hand before the clock starts. Features are used
as unevenly as `--skew` says: the one of rank r in proportion to r^-skew. Nothing is printed or
written unless results are those of float64.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write
from torch import Tensor

from dreamreader.ops import SparseRows, sparse_column_sums, sparse_decode, sparse_outer

GOALS = {"bag": 1.0, "dense": 15.0}  # times the speed, of decoding


class Job:
    """Codes, matrices, and everything that is timed."""

    def __init__(self, sizes: dict[str, int], skew: float, dtype: torch.dtype):
        g = torch.Generator().manual_seed(0)
        rows, width, k, d = (sizes[name] for name in ("rows", "width", "k", "d"))
        often = torch.arange(1, width + 1).double() ** -skew
        often = often[torch.randperm(width, generator=g)].expand(rows, -1)
        self.columns = torch.multinomial(often, k, generator=g).sort().values
        values = torch.rand(rows, k, generator=g).to(dtype) + 0.1
        self.codes = SparseRows(
            torch.arange(0, rows * k + 1, k), self.columns.int().flatten(), values.flatten(), width
        )
        self.dense = self.codes.dense()
        self.x, self.grad = (torch.randn(rows, d, generator=g).to(dtype) for _ in range(2))
        self.weight = (torch.randn(width, d, generator=g) / d**0.5).to(dtype)
        self.bias = torch.randn(d, generator=g).to(dtype)
        inputs = [each.detach().requires_grad_() for each in (self.codes.values, self.weight)]
        self.graph = sparse_decode(replace(self.codes, values=inputs[0]), inputs[1]), inputs

    def decode(self) -> Tensor:
        return sparse_decode(self.codes, self.weight, self.bias)

    def decode_bag(self) -> Tensor:
        bag = torch.nn.functional.embedding_bag
        weights = self.codes.values.view(self.columns.shape)
        return bag(self.columns, self.weight, mode="sum", per_sample_weights=weights) + self.bias

    def decode_dense(self) -> Tensor:
        return torch.addmm(self.bias, self.dense, self.weight)

    def backward(self) -> tuple[Tensor, ...]:
        d_values, d_weight = torch.autograd.grad(*self.graph, self.grad, retain_graph=True)
        changed = replace(self.codes, values=d_values)
        return d_weight, sparse_outer(changed, self.x), sparse_column_sums(changed)

    def backward_dense(self) -> tuple[Tensor, ...]:
        d_codes = torch.where(self.dense != 0, self.grad @ self.weight.T, 0)
        return self.dense.T @ self.grad, d_codes.T @ self.x, d_codes.sum(0)

    def calls(self) -> dict[str, Any]:
        return {
            "decode": self.decode,
            "decode_bag": self.decode_bag,
            "decode_dense": self.decode_dense,
            "backward": self.backward,
            "backward_dense": self.backward_dense,
        }

    def problems(self) -> list[str]:
        """In words, what does not give what float64 gives."""
        exact = Job.__new__(Job)
        exact.__dict__ = {
            name: each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
            for name, each in vars(self).items()
        }
        wanted = {"decode": exact.decode_dense(), "backward": exact.backward_dense()}
        found = []
        for name, call in self.calls().items():
            for got, best in zip(parts(call()), parts(wanted[name.split("_")[0]]), strict=True):
                error = float((got.double() - best).abs().max() / best.abs().max())
                if not error <= 16 * torch.finfo(got.dtype).eps:
                    found.append(f"{name}: relative error {error:.2g} in {got.dtype}")
        return found

    def measured(self, rounds: int) -> dict[str, Any]:
        times, left_out = interleaved(self.calls(), rounds)
        for form in ("", "_dense"):
            both = zip(times["decode" + form], times["backward" + form], strict=True)
            times["step" + form] = [sum(each) for each in both]
        return {
            "dtype": str(self.weight.dtype).removeprefix("torch."),
            "milliseconds": {name: summary(each)["median"] * 1e3 for name, each in times.items()},
            "speedup": {
                name: summary(times[name], times[name.split("_")[0]])
                for name in times
                if "_" in name
            },
            "rounds_left_out": left_out,
        }


def parts(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("rows", "width", "k", "d")}
    few = sizes | {"rows": min(96, sizes["rows"])}
    dtypes = [getattr(torch, each) for each in options.dtypes]
    found = [one for each in dtypes for one in Job(few, options.skew, each).problems()]
    if found:
        print("no times, since these checks failed:", *found, sep="\n  ", file=sys.stderr)
        return 1
    rows = [Job(sizes, options.skew, each).measured(options.rounds) for each in dtypes]
    result = {
        "benchmark": "sae-products",
        "environment": environment(),
        "sizes": sizes,
        "skew": options.skew,
        "rounds": options.rounds,
        "rows": rows,
        "goals": GOALS,
    }
    for row in rows:
        show(row)
    if options.write:
        print(write(result, options.output or "sae-products"))
    return 0


def show(row: dict[str, Any]) -> None:
    noisy = "   too few quiet rounds" if row["rounds_left_out"] == -1 else ""
    print(row["dtype"] + noisy)
    for name, ratio in row["speedup"].items():
        own, other = (row["milliseconds"][each] for each in (name.split("_")[0], name))
        spread = f"[{ratio['q20']:.2f}, {ratio['q80']:.2f}]"
        print(f"  {name:15s} {other:8.1f} ms, ours {own:7.1f}: {ratio['median']:6.2f} {spread}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--d", type=int, default=1280)
    parser.add_argument(
        "--skew", type=float, default=0.0, help="exponent of how often features are"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--output", type=Path, help="file to write instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
