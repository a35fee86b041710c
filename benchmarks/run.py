"""Times the intervention program beside plain torch and beside touching the same memory.

`fused` is what the engine calls: a result of its own, with what the edit did to the values told by
the same pass. `in_place` is the same program in the memory of its input.

    python benchmarks/run.py [--rows 8192] [--width 1280] [--dtypes float32 bfloat16] [--rounds 30]

Every ratio is between calls of the same round. Inputs rotate, so that none is left in the cache by
the call before. Nothing is printed or written unless every result passes the tests' tolerance rule.
"""

import argparse
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import environment, interleaved, summary, write
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from dreamreader import _register  # noqa: E402
from dreamreader.ops import (  # noqa: E402
    Instruction,
    Program,
    intervene,
    intervene_,
    intervene_reference,
)
from dreamreader.ops.intervention import intervene_seen  # noqa: E402
from tests.cases import intervention as cases  # noqa: E402
from tests.cases._compare import assert_close  # noqa: E402

Call = Callable[[Tensor], Any]
ROTATED = 4  # inputs that take turns


def masked_steer(case: cases.Case, g: torch.Generator) -> list[Instruction]:
    """Every second row on average, strength 0.01."""
    mask = torch.rand(case.shape[:2], generator=g) < 0.5
    return [Instruction("steer", mask * 0.01, vectors=cases.direction(case, g))]


def ablate(case: cases.Case, g: torch.Generator) -> list[Instruction]:
    return [Instruction("project", vectors=cases.direction(case, g))]


def three(case: cases.Case, g: torch.Generator) -> list[Instruction]:
    steer = Instruction("steer", 0.01, vectors=cases.direction(case, g))
    return [steer, *ablate(case, g), Instruction("clamp", lo=-3.0, hi=3.0)]


KINDS: dict[str, tuple[cases.Make, str]] = {
    "masked_steer": (masked_steer, "dense"),
    "ablate": (ablate, "dense"),
    "clamp": (lambda c, g: [Instruction("clamp", lo=-3.0, hi=3.0)], "dense"),
    "zero": (cases.KINDS["zero"], "dense"),
    "three": (three, "dense"),
    "subspace_8": (lambda c, g: [Instruction("project", vectors=cases.subspace(c, g, 8))], "dense"),
    "subspace_64": (
        lambda c, g: [Instruction("project", vectors=cases.subspace(c, g, 64))],
        "dense",
    ),
    "masked_steer_nchw": (masked_steer, "nchw"),
    "ablate_nchw": (ablate, "nchw"),
}
# At most this many times a rewrite of the memory; at least this many times faster than the others.
GOALS = {
    ("masked_steer", "float32"): {"eager": 8.0, "rewrite": 1.2},
    ("ablate", "float32"): {"eager": 8.0, "rewrite": 1.2},
    ("masked_steer", "bfloat16"): {"eager": 2.0, "rewrite": 1.2},
    ("ablate", "bfloat16"): {"eager": 2.0, "rewrite": 1.2},
    ("three", "float32"): {"separate": 2.5},
    ("three", "bfloat16"): {"separate": 2.5},
}


def eager(kind: str, program: Program, dtype: torch.dtype) -> dict[str, Call]:
    """The same change composed of torch functions, in place (the engine's function is not)."""
    vectors = program.vectors.to(dtype)
    if kind.startswith("masked_steer"):
        mask, v = (program.strength[0] != 0).unsqueeze(-1), vectors[0]
        factors = program.strength[0].to(dtype).unsqueeze(-1)
        return {
            "eager": lambda x: x.copy_(torch.where(mask, x + 0.01 * v, x)),
            # One kernel, but 0 * inf where a row is not meant, and factors in low precision.
            "addcmul": lambda x: x.addcmul_(factors, v),
        }
    if kind.startswith(("ablate", "subspace")):
        return {"eager": lambda x: x.sub_((x @ vectors.T) @ vectors)}
    if kind == "clamp":
        return {"eager": lambda x: x.clamp_(-3.0, 3.0)}
    if kind == "zero":
        return {"eager": lambda x: x.zero_()}
    first, second = vectors
    alpha = 0.01
    return {
        "eager": lambda x: (
            x.add_(alpha * first).sub_((x @ second)[..., None] * second).clamp_(-3, 3)
        )
    }


def separate(case: cases.Case) -> Call:
    """One call for each instruction."""
    rows, tokens, width = case.shape
    instructions = case.make(case, torch.Generator().manual_seed(1))
    programs = [Program([each], rows=rows, tokens=tokens, width=width) for each in instructions]

    def run(x: Tensor) -> None:
        for program in programs:
            intervene_(x, program)

    return run


def check(case: cases.Case, dtype: torch.dtype) -> None:
    """Raises AssertionError unless both ops pass the tolerance rule."""
    program, x = case.program(), case.input(dtype)
    same = intervene_reference(x, *program.tables(dtype))
    exact = intervene_reference(x.double(), *program.tables(torch.float64))
    assert_close(intervene(x, program), same, exact)
    assert_close(intervene_(x, program), same, exact)


def measure(kind: str, case: cases.Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times and ratios of one kind."""
    program = case.program()
    inputs = [case.input(dtype) for _ in range(ROTATED)]
    seen = torch.zeros(1, dtype=torch.int32)
    calls: dict[str, Call] = {
        "rewrite": lambda x: x.mul_(1.0),
        "fused": lambda x: intervene_seen(x, program, seen, 0),
        "in_place": lambda x: intervene_(x, program),
        **eager(kind, program, dtype),
    }
    if len(program) > 1:
        calls["separate"] = separate(case)
    turn = iter(range(10**9))
    timed = {
        name: (lambda call=call: call(inputs[next(turn) % ROTATED])) for name, call in calls.items()
    }
    for call in timed.values():
        call()
    times, left_out = interleaved(timed, rounds, most=3 * rounds)
    moved = 2 * inputs[0].numel() * inputs[0].element_size()
    others = [name for name in calls if name not in ("fused", "in_place", "rewrite")]
    return {
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(case.shape),
        "layout": case.layout,
        "milliseconds": {
            name: round(summary(each)["median"] * 1e3, 4) for name, each in times.items()
        },
        "gigabytes_per_second": round(moved / summary(times["fused"])["median"] / 1e9, 1),
        "fused_to_rewrite": summary(times["fused"], times["rewrite"]),
        "in_place_to_rewrite": summary(times["in_place"], times["rewrite"]),
        "speedup": {name: summary(times[name], times["fused"]) for name in others},
        "in_place_speedup": {name: summary(times[name], times["in_place"]) for name in others},
        "noisy_rounds": left_out,
    }


def tiny_call() -> dict[str, float]:
    """Microseconds of one public call on eight numbers, the best of many tries."""
    x = torch.randn(1, 1, 8)
    program = Program([Instruction("steer", vectors=torch.randn(8))], rows=1, tokens=1, width=8)
    calls = {"intervene_": lambda: intervene_(x, program), "add_": lambda: x.add_(1.0)}
    calls["intervene"] = lambda: intervene(x, program)
    number = 5000
    return {
        name: round(min(timeit.repeat(call, number=number, repeat=30)) / number * 1e6, 2)
        for name, call in calls.items()
    }


def verdict(row: dict[str, Any]) -> str:
    """Which goals the row reaches."""
    parts = []
    for against, bound in GOALS.get((row["kind"], row["dtype"]), {}).items():
        if against == "rewrite":
            reached = row["fused_to_rewrite"]["median"] <= bound
            parts.append(f"<= {bound}x rewrite: {'yes' if reached else 'NO'}")
        else:
            reached = row["speedup"][against]["median"] >= bound
            parts.append(f">= {bound}x {against}: {'yes' if reached else 'NO'}")
    return ", ".join(parts)


def show(row: dict[str, Any]) -> None:
    faster = " ".join(f"{name} {value['median']:.2f}x" for name, value in row["speedup"].items())
    print(
        f"{row['kind']:18} {row['dtype']:9} {row['milliseconds']['fused']:8.3f} ms "
        f"{row['gigabytes_per_second']:6.1f} GB/s "
        f"{row['fused_to_rewrite']['median']:5.2f}x rewrite  "
        f"in place {row['in_place_to_rewrite']['median']:5.2f}x  "
        f"faster than {faster}  {verdict(row)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/ops-cpu.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (1, arguments.rows, arguments.width)
    jobs = [
        (kind, cases.Case(kind, shape, KINDS[kind][0], KINDS[kind][1]), getattr(torch, dtype))
        for dtype in arguments.dtypes
        for kind in arguments.kinds
    ]
    for kind, case, dtype in jobs:
        try:
            check(case, dtype)
        except AssertionError as error:
            sys.exit(f"{kind} in {dtype}: wrong result, nothing is timed: {error}")
    rows = []
    for kind, case, dtype in jobs:
        rows.append(measure(kind, case, dtype, arguments.rounds))
        show(rows[-1])
    tiny = tiny_call()
    print(f"microseconds on 8 numbers: {tiny}")
    if arguments.write:
        backend = _register.active["intervene_"]["CPU"].backend
        result = {"environment": environment(), "backend": backend, "rows": rows, "tiny_call": tiny}
        print(write(result, "ops"))


if __name__ == "__main__":
    main()
