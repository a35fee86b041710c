"""Times the intervention program on a GPU beside a device copy of the same bytes.

    python benchmarks/gpu.py [--rows 8192] [--width 1280] [--rounds 30] [--output FILE]
    python benchmarks/gpu.py --check     # no times; on the CPU where there is no GPU

Every call is a replay of a captured graph over inputs that together
exceed the L2 cache twice, timed with events and interleaved with the copy. Nothing is timed unless
the results pass the tolerance rule of the tests, and a call is one launch without a wait.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import environment, summary, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1]))

from run import KINDS  # noqa: E402

from dreamreader import _register  # noqa: E402
from dreamreader.ops import Instruction, intervene_reference  # noqa: E402
from tests.cases import intervention as cases  # noqa: E402
from tests.cases._compare import assert_close  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPLAYS = 20  # of one timing
# At most this many times a copy of the same bytes.
GOALS = {
    "steer": 1.15,
    "masked_steer": 1.15,
    "clamp": 1.15,
    "ablate": 1.15,
    "zero": 0.65,
    "mean": 0.65,
}
EXTRA: dict[str, tuple[cases.Make, str]] = {
    "steer": (cases.KINDS["steer_constant"], "dense"),
    "mean": (lambda c, g: [Instruction("fill", vectors=cases.direction(c, g))], "dense"),
}


def prepared(case: cases.Case, dtype: torch.dtype) -> tuple[Tensor, list[Any]]:
    """An input and the packed tables on the device."""
    code, *tables, patches = case.program().tables(dtype)
    there = [code, *(each.to(DEVICE) for each in tables), [each.to(DEVICE) for each in patches]]
    return on_device(case.input(dtype)), there


def on_device(x: Tensor) -> Tensor:
    """The same values and strides in memory of the device."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


def check(case: cases.Case, dtype: torch.dtype) -> None:
    """Raises AssertionError unless the results are right, in place and out of place."""
    x, tables = prepared(case, dtype)
    cpu, program = case.input(dtype), case.program()
    same = intervene_reference(cpu, *program.tables(dtype))
    exact = intervene_reference(cpu.double(), *program.tables(torch.float64))
    out = torch.ops.dreamreader.intervene(x, *tables)
    assert_close(out.cpu(), same, exact)
    torch.ops.dreamreader.intervene_(x, *tables)
    assert torch.equal(x, out), "in place and out of place differ"


def check_launch(case: cases.Case, dtype: torch.dtype) -> None:
    """Raises AssertionError unless a call is one launch without a wait."""
    x, tables = prepared(case, dtype)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        torch.cuda.set_sync_debug_mode("error")
        torch.ops.dreamreader.intervene_(x, *tables)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    launches = [each.name for each in seen.events() if "intervention_kernel" in each.name]
    assert len(launches) == 1, f"{len(launches)} launches"


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls in order, after one round outside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Time of one call inside the graph."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / (REPLAYS * calls)


def measure(kind: str, case: cases.Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times and the ratio to the copy."""
    first, tables = prepared(case, dtype)
    size = first.numel() * first.element_size()
    rotated = max(2, 2 * torch.cuda.get_device_properties(0).L2_cache_size // size + 1)
    inputs = [first, *(on_device(case.input(dtype)) for _ in range(rotated - 1))]
    copies = [torch.empty_like(each) for each in inputs]
    graphs = {
        "copy": captured(
            [lambda a=a, b=b: b.copy_(a) for a, b in zip(inputs, copies, strict=True)]
        ),
        "fused": captured(
            [lambda a=a: torch.ops.dreamreader.intervene_(a, *tables) for a in inputs]
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 2):
        for name in list(graphs) if number % 2 else list(graphs)[::-1]:
            spent = seconds(graphs[name], rotated)
            if number >= 2:  # the first two warm up
                times[name].append(spent)
    return {
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(case.shape),
        "layout": case.layout,
        "rotated_inputs": rotated,
        "microseconds": {
            name: round(statistics.median(each) * 1e6, 2) for name, each in times.items()
        },
        "copy_gigabytes_per_second": round(2 * size / statistics.median(times["copy"]) / 1e9),
        "fused_to_copy": summary(times["fused"], times["copy"]),
        "goal": GOALS.get(kind),
    }


def main() -> None:
    arguments = parse()
    shape = (1, arguments.rows, arguments.width)
    jobs = [
        (kind, cases.Case(kind, shape, *made), getattr(torch, dtype))
        for dtype in arguments.dtypes
        for kind, made in (EXTRA | KINDS).items()
    ]
    for kind, case, dtype in jobs:
        try:
            check(case, dtype)
            if not arguments.check:
                check_launch(case, dtype)
        except AssertionError as error:
            sys.exit(f"{kind} in {dtype}: wrong result, nothing is timed: {error}")
    print(f"{len(jobs)} cases are right on {DEVICE}")
    if arguments.check:
        return
    backend = _register.active["intervene_"]["CUDA"].backend
    if backend == "reference":
        sys.exit("neither the CUDA nor the Triton kernel is active, see `dreamreader doctor`")
    rows = []
    for kind, case, dtype in jobs:
        rows.append(measure(kind, case, dtype, arguments.rounds))
        show(kind, rows[-1])
    result = {"environment": environment(), "backend": backend, "rows": rows}
    if arguments.output:
        print(write(result, arguments.output))


def show(kind: str, row: dict[str, Any]) -> None:
    ratio, goal = row["fused_to_copy"]["median"], GOALS.get(kind)
    verdict = "" if goal is None else f"  <= {goal}x: {'yes' if ratio <= goal else 'NO'}"
    print(
        f"{kind:18} {row['dtype']:9} {row['microseconds']['fused']:9.2f} us  "
        f"copy {row['microseconds']['copy']:9.2f} us  {ratio:5.2f}x copy{verdict}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, ["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1280)
    return checked(parser)


def parser_of(doc: str | None, dtypes: list[str]) -> argparse.ArgumentParser:
    """The options that benchmarks of a GPU share."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", default=dtypes)
    parser.add_argument("--check", action="store_true", help="only check the results")
    parser.add_argument("--output", type=Path, help="file to write")
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; ends where a GPU is missing that they need."""
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.check:
        sys.exit("there is no CUDA device: nothing is measured; --check runs on the CPU")
    return arguments


if __name__ == "__main__":
    main()
