"""Times the intervention program on a GPU beside a device copy of the same bytes.

Run by `run.py --device cuda`. Every call is a replay of a captured graph over inputs that together
exceed the L2 cache twice, timed with events and interleaved with the copy. Nothing is timed unless
the results pass the tolerance rule of the tests, and a call is one launch without a wait.
"""

import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from paired import RESULTS, environment, summary, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dreamreader import _register
from dreamreader.ops import Instruction, intervene_reference
from tests.cases import intervention as cases
from tests.cases._compare import assert_close

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
    """An input and the packed tables on the GPU."""
    code, *tables, patches = case.program().tables(dtype)
    there = [code, *(each.cuda() for each in tables), [each.cuda() for each in patches]]
    return on_gpu(case.input(dtype)), there


def on_gpu(x: Tensor) -> Tensor:
    """The same values and strides in GPU memory."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def check(case: cases.Case, dtype: torch.dtype) -> None:
    """Raises AssertionError unless the result is right and takes one launch without a wait."""
    x, tables = prepared(case, dtype)
    cpu, program = case.input(dtype), case.program()
    same = intervene_reference(cpu, *program.tables(dtype))
    exact = intervene_reference(cpu.double(), *program.tables(torch.float64))
    out = torch.ops.dreamreader.intervene(x, *tables)
    assert_close(out.cpu(), same, exact)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        torch.cuda.set_sync_debug_mode("error")
        torch.ops.dreamreader.intervene_(x, *tables)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    launches = [each.name for each in seen.events() if "intervention_kernel" in each.name]
    assert len(launches) == 1, f"{len(launches)} launches"
    assert torch.equal(x, out), "in place and out of place differ"


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
    inputs = [first, *(on_gpu(case.input(dtype)) for _ in range(rotated - 1))]
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
    }


def run(kinds: dict[str, tuple[cases.Make, str]], arguments: Any) -> None:
    """Checks, times and prints the chosen kinds; writes the result if asked to."""
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device: nothing is measured")
    backend = _register.active["intervene_"]["CUDA"].backend
    if backend == "reference":
        sys.exit("neither the CUDA nor the Triton kernel is active, see `dreamreader doctor`")
    shape = (1, arguments.rows, arguments.width)
    jobs = [
        (kind, cases.Case(kind, shape, *made), getattr(torch, dtype))
        for dtype in arguments.dtypes
        for kind, made in (EXTRA | kinds).items()
        if kind in arguments.kinds or kind in EXTRA
    ]
    for kind, case, dtype in jobs:
        try:
            check(case, dtype)
        except AssertionError as error:
            sys.exit(f"{kind} in {dtype}: wrong result, nothing is timed: {error}")
    rows = []
    for kind, case, dtype in jobs:
        row = measure(kind, case, dtype, arguments.rounds)
        rows.append(row)
        ratio, goal = row["fused_to_copy"]["median"], GOALS.get(kind)
        verdict = "" if goal is None else f"  <= {goal}x: {'yes' if ratio <= goal else 'NO'}"
        print(
            f"{kind:18} {row['dtype']:9} {row['microseconds']['fused']:9.2f} us  "
            f"copy {row['microseconds']['copy']:9.2f} us  {ratio:5.2f}x copy{verdict}",
            flush=True,
        )
    if arguments.write:
        device = torch.cuda.get_device_name()
        where = environment() | {"gpu": device, "cuda": torch.version.cuda}
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        print(
            write(
                {"environment": where, "backend": backend, "rows": rows},
                RESULTS / f"ops-{name}.json",
            )
        )
