"""Times the attention maps of words beside plain torch that keeps all probabilities.

    python benchmarks/attention.py [--queries 4096] [--keys 77] [--rounds 30] [--write]

`eager` is the formula as one writes it, in float32: softmax(q k' scale) and a product with the
weights. `baddbmm` is the quickest composition that we know: scores in the dtype of q from one fused
call into memory that is kept, softmax in float32; from bfloat16 its scores are rounded, so it is
less exact. Every ratio is between calls of the same round. Nothing is printed or written unless the
results pass the tests' tolerance rule and the peak of memory stays that of the result.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from dreamreader import _register  # noqa: E402
from dreamreader.ops import attention_words_, attention_words_reference_  # noqa: E402
from tests.cases._compare import assert_close  # noqa: E402
from tests.cases.attention_words import Case, Sizes  # noqa: E402

GOAL = 4.0  # times faster than eager
SLACK = 2 << 20  # bytes beside the result: scratch of the threads, pages of the allocator
Call = Callable[[], Any]


def eager(out: Tensor, query: Tensor, key: Tensor, weights: Tensor, scale: float) -> Call:
    """The formula in float32, as one writes it."""

    def run() -> None:
        p = (query.float() @ key.float().transpose(2, 3) * scale).softmax(-1)  # [B, H, Q, K]
        out.add_((p @ weights.transpose(1, 2)).transpose(2, 3))

    return run


def baddbmm(out: Tensor, query: Tensor, key: Tensor, weights: Tensor, scale: float) -> Call:
    """Scores in one call into memory that is kept, softmax in float32."""
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    scores = query.new_empty(batch * heads, queries, keys)
    sums, columns = out.flatten(0, 1), weights[0].T

    def run() -> None:
        q, k = query.reshape(-1, queries, width), key.reshape(-1, keys, width)
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        p = scores.softmax(-1, dtype=torch.float32)
        sums.add_((p @ columns).transpose(1, 2))

    return run


def check(case: Case, dtype: torch.dtype) -> None:
    """Raises AssertionError unless the op passes the tolerance rule."""
    query, key, weights, mask, causal, scale = case.operands(dtype)
    same, exact, out = (case.out(dtype, factor=0.0) for _ in range(3))
    exact = exact.double()
    attention_words_reference_(same, query, key, weights, mask, causal, scale)
    attention_words_reference_(
        exact, query.double(), key.double(), weights.double(), mask, causal, scale
    )
    assert_close(attention_words_(out, query, key, weights), same, exact)


def peak_bytes(call: Call) -> int:
    """By how much the process grows at most while the call runs."""
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls left to the allocator
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times, ratios and peaks of one case."""
    query, key, weights, _, _, scale = case.operands(dtype)
    outs = [torch.zeros_like(case.out(dtype)) for _ in range(3)]
    calls: dict[str, Call] = {
        "fused": lambda: attention_words_(outs[0], query, key, weights),
        "eager": eager(outs[1], query, key, weights, scale),
        "baddbmm": baddbmm(outs[2], query, key, weights, scale),
    }
    for call in calls.values():
        call()
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)
    peak = peak_bytes(calls["fused"])
    result = outs[0].numel() * outs[0].element_size()
    assert peak <= result + SLACK, f"peak of {peak} bytes for a result of {result}"
    times, left_out = interleaved(calls, rounds, most=3 * rounds)
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": case.sizes._asdict(),
        "layout": case.layout,
        "milliseconds": {
            name: round(summary(each)["median"] * 1e3, 3) for name, each in times.items()
        },
        "speedup": {
            name: summary(times[name], times["fused"]) for name in calls if name != "fused"
        },
        "peak_bytes": {"fused": peak, "eager": peak_bytes(calls["eager"]), "result": result},
        "noisy_rounds": left_out,
    }


def show(row: dict[str, Any]) -> None:
    faster = " ".join(f"{name} {value['median']:.2f}x" for name, value in row["speedup"].items())
    reached = "yes" if row["speedup"]["eager"]["median"] >= GOAL else "NO"
    print(
        f"{row['case']:16} {row['dtype']:9} {row['milliseconds']['fused']:7.2f} ms  faster than "
        f"{faster}  peak {row['peak_bytes']['fused'] / 2**20:.2f} MiB, eager "
        f"{row['peak_bytes']['eager'] / 2**20:.1f} MiB  >= {GOAL}x eager: {reached}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=77)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--words", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/attention-cpu.json"
    )
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    jobs = [
        (
            Case(
                f"{layout}-{words}-words",
                Sizes(1, a.heads, a.heads, a.queries, a.keys, a.width, words),
                layout,
                weights="pairs",
            ),
            getattr(torch, dtype),
        )
        for dtype in a.dtypes
        for layout in ("tokens", "dense")
        for words in a.words
    ]
    for case, dtype in jobs:
        try:
            check(case, dtype)
        except AssertionError as error:
            sys.exit(f"{case.name} in {dtype}: wrong result, nothing is timed: {error}")
    rows = []
    for case, dtype in jobs:
        rows.append(measure(case, dtype, a.rounds))
        show(rows[-1])
    if a.write:
        backend = _register.active["attention_words_"]["CPU"].backend
        result = {"environment": environment(), "backend": backend, "goal": GOAL, "rows": rows}
        print(write(result, "attention"))


if __name__ == "__main__":
    main()
