"""Times selections beside torch's topk, and encoding with a selection beside the bare product.

    python benchmarks/sae_ops.py [--rows 4096] [--width 16384] [--k 64] [--rounds 9] [--write]

Every ratio is between calls of the same round. `read` is torch's sum of the same memory, `torch`
the topk of all entries and a scatter into zeros, as autoencoder libraries select. Nothing is timed
unless the selection is the set that a stable sort gives.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from dreamreader import ops  # noqa: E402

Calls = dict[str, Callable[[], Any]]
HARD = {  # data that mislead a guess, from the friendly ones
    "all_equal": lambda x: torch.full_like(x, 2.5),
    "all_zero": torch.zeros_like,
    "one_giant_row": lambda x: torch.cat([x[:7], x[7:8].abs() * 1000, x[8:]]),
    "half_ties": lambda x: torch.where(torch.rand(x.shape) < 0.5, 1.0, x).to(x.dtype),
    "all_nan": lambda x: torch.full_like(x, torch.nan),
    "ascending_rows": lambda x: torch.arange(x.shape[1]).to(x.dtype).expand_as(x).contiguous(),
}


def friendly(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers in rows of different scale."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=g)
    return x.mul_(torch.rand(rows, 1, generator=g) + 0.5).to(dtype)


def read(x: Tensor) -> Callable[[], Tensor]:
    words = x.view(torch.float32) if x.dtype == torch.bfloat16 else x
    return lambda: words.sum()


def flat_topk(x: Tensor, count: int) -> Tensor:
    found = x.relu().flatten().topk(count, sorted=False)
    return torch.zeros(x.numel(), dtype=x.dtype).scatter_(0, found.indices, found.values)


def check(x: Tensor, count: int) -> None:
    """Raises AssertionError unless the entries are those of a stable sort."""
    codes = ops.batch_topk(x, count)
    order = x.relu().flatten().sort(descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(codes.row_of() * x.shape[1] + codes.columns, order)


def selections(x: Tensor, k: int) -> Calls:
    count = k * len(x)
    return {
        "read": read(x),
        "batch_topk": lambda: ops.batch_topk(x, count),
        "torch": lambda: flat_topk(x, count),
        "topk": lambda: ops.topk(x, k),
        "torch_rows": lambda: x.topk(k, dim=1, sorted=False),
        "threshold_select": lambda: ops.threshold_select(x, torch.tensor(3.0), 4 * count),
    }


def hard(x: Tensor, k: int) -> Calls:
    count = k * len(x)
    calls: Calls = {"batch_topk": lambda: ops.batch_topk(x, count), "topk": lambda: ops.topk(x, k)}
    for name, change in HARD.items():
        other = change(x)
        calls[f"batch_topk_{name}"] = lambda other=other: ops.batch_topk(other, count)
        calls[f"topk_{name}"] = lambda other=other: ops.topk(other, k)
    return calls


def encoders(rows: int, d: int, width: int, k: int, dtype: torch.dtype) -> Calls:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, d, generator=g).to(dtype)
    weight = (torch.randn(width, d, generator=g) / d**0.5).to(dtype)
    bias = torch.zeros(width, dtype=dtype)
    threshold, linear = torch.tensor(2.7), torch.nn.functional.linear

    def encode(rule: str, count: int, **more: Any) -> Callable[[], Any]:
        return lambda: ops.encode_select(x, weight, bias, rule=rule, count=count, **more)

    return {
        "linear": lambda: linear(x, weight, bias),
        "linear_and_topk": lambda: flat_topk(linear(x, weight, bias), k * rows),
        "encode_batch_topk": encode("batch_topk", k * rows),
        "encode_topk": encode("topk", k),
        "encode_threshold": encode("threshold", 0, threshold=threshold, slots=4 * k * rows),
    }


def measure(name: str, calls: Calls, rounds: int) -> dict[str, Any]:
    """Times of the calls, and each to the first."""
    for call in calls.values():
        call()
    times, left_out = interleaved(calls, rounds, most=3 * rounds)
    first = next(iter(calls))
    row = {
        "case": name,
        "milliseconds": {n: round(summary(t)["median"] * 1e3, 3) for n, t in times.items()},
        "to_" + first: {n: summary(t, times[first]) for n, t in times.items()},
        "noisy_rounds": left_out,
    }
    for ours, other in (("batch_topk", "torch"), ("topk", "torch_rows")):
        if other in times:
            row[f"{ours}_faster_than_{other}"] = summary(times[other], times[ours])
    for ours in ("encode_batch_topk", "encode_topk", "encode_threshold"):
        if ours in times:
            row[f"{ours}_faster"] = summary(times["linear_and_topk"], times[ours])
    print(name, row["milliseconds"], f"noisy {left_out}", flush=True)
    for key, value in row.items():
        if "faster" in key:
            print(f"  {key}: {value['median']:.1f} ({value['q20']:.1f} to {value['q80']:.1f})")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--encoder", type=int, nargs=3, default=[1024, 1280, 16384])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--parts", nargs="+", default=["selections", "hard", "encoders"])
    parser.add_argument("--write", action="store_true", help="write results/sae-ops-cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    k, rows = arguments.k, []
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        x = friendly(arguments.rows, arguments.width, dtype)
        check(x[:256], k * 256)
        if "selections" in arguments.parts:
            rows.append(measure(f"selections {name}", selections(x, k), arguments.rounds))
        if "hard" in arguments.parts:
            rows.append(measure(f"hard {name}", hard(x, k), arguments.rounds))
        del x
        if "encoders" in arguments.parts:
            n, d, width = arguments.encoder
            calls = encoders(n, d, width, k, dtype)
            rows.append(measure(f"encoders {name}", calls, arguments.rounds))
    if arguments.write:
        print(write({"environment": environment(), "rows": rows}, "sae-ops"))


if __name__ == "__main__":
    main()
