"""Times the operators of learned edits on a GPU, as gpu.py does: replays of captured graphs.

    python benchmarks/gpu_edits.py [--rounds 30] [--output FILE]
    python benchmarks/gpu_edits.py --check     # no times; on the CPU where there is no GPU

`low_rank` in place stands beside a device copy of the same bytes and beside plain torch, its
gradient beside autograd of plain torch, `guide` beside autograd of the same probe.
Nothing is timed unless it agrees with the reference.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from paired import environment, summary, write
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from gpu import DEVICE, captured, checked, parser_of, seconds  # noqa: E402
from guide import ODD_ROWS, wrong_rows  # noqa: E402

from dreamreader import _register  # noqa: E402
from dreamreader.ops.guide import guide_reference  # noqa: E402
from dreamreader.ops.low_rank import (  # noqa: E402
    NEEDS,
    low_rank_backward_reference,
    low_rank_reference,
)
from tests.cases._compare import assert_close  # noqa: E402
from tests.cases.guide import Case as Guide  # noqa: E402
from tests.cases.low_rank import Case as LowRank  # noqa: E402

OPS = torch.ops.dreamreader
EDITS = [
    LowRank("4096x4096-8", (1, 4096, 4096), 8, strength="one"),
    LowRank("8192x4096-8", (1, 8192, 4096), 8, strength="one"),
    LowRank("8192x4096-32", (1, 8192, 4096), 32, strength="one"),
    LowRank("4096x1280-32", (1, 4096, 1280), 32, strength="one"),
]
PROBES = [
    Guide(f"8192x1280-{steps}", (1, 8192, 1280), (128, 128), 8, iterations=steps, selection="all")
    for steps in (1, 5, 10)
]


def there(value: Any) -> Any:
    """The same arguments in memory of the device."""
    if isinstance(value, (list, tuple)):
        return [there(each) for each in value]
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def doubled(value: Any) -> Any:
    """The same arguments in float64."""
    if isinstance(value, (list, tuple)):
        return [doubled(each) for each in value]
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floats else value


def edit_calls(case: LowRank, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The edit, its gradient, and what they are compared with; the results are checked."""
    x, *tables = there(case.inputs(dtype))
    grad, exact = case.gradient(dtype).to(DEVICE), doubled([x, *tables])
    same = low_rank_reference(x, *tables)
    assert_close(OPS.low_rank(x, *tables), same, low_rank_reference(*exact))
    found = OPS.low_rank_backward(grad, x, *tables, NEEDS)
    expected = (
        low_rank_backward_reference(grad, x, *tables, needs=NEEDS),
        low_rank_backward_reference(grad.double(), *exact, needs=NEEDS),
    )
    for each in zip(found, *expected, strict=True):
        assert_close(*each)
    down, bias, up = (each[0].to(dtype) for each in tables[:3])
    learned = [each.detach().requires_grad_() for each in (x, down, bias, up)]
    copy, edited = torch.empty_like(x), x.clone()

    def plain(x: Tensor, down: Tensor, bias: Tensor, up: Tensor) -> Tensor:
        return x + (x @ down.T + bias) @ up

    def both() -> None:
        OPS.low_rank(x, *tables)
        OPS.low_rank_backward(grad, x, *tables, NEEDS)

    return {
        "copy": lambda: copy.copy_(x),
        "edit": lambda: OPS.low_rank_(edited, *tables),
        "edit in torch": lambda: plain(x, down, bias, up),
        "with gradient": both,
        "with gradient in torch": lambda: torch.autograd.grad(plain(*learned), learned, grad),
    }


def guide_calls(case: Guide, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Guidance, and the same by autograd through the probe; the result is checked."""
    x, *arguments = there(case.inputs(dtype))
    rows = wrong_rows(OPS.guide(x, *arguments), guide_reference(*doubled([x, *arguments])))
    assert float(rows.double().mean()) <= ODD_ROWS, f"{int(rows.sum())} rows are wrong"
    weights, biases, _, c, strength, *_ = arguments

    def by_autograd() -> Tensor:
        h = x.float()
        for _ in range(case.iterations):
            leaf = a = h.detach().requires_grad_()
            for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                a = (torch.relu(a) if n else a) @ weight.T + bias
            (gradient,) = torch.autograd.grad((a * c.unsqueeze(1)).sum(), leaf)
            h = h - strength.unsqueeze(-1) * gradient
        return h.to(dtype)

    copy = torch.empty_like(x)
    return {
        "copy": lambda: copy.copy_(x),
        "guide": lambda: OPS.guide(x, *arguments),
        "autograd": by_autograd,
    }


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Microseconds, and ratios to the copy and to the plain form, in interleaved rounds."""
    graphs = {name: captured([call]) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 2):
        for name in list(graphs) if number % 2 else list(graphs)[::-1]:
            spent = seconds(graphs[name], 1)
            if number >= 2:  # the first two warm up
                times[name].append(spent)
    medians = {name: round(statistics.median(each) * 1e6, 2) for name, each in times.items()}
    return {
        "microseconds": medians,
        "to_copy": {name: summary(each, times["copy"]) for name, each in times.items()},
    }


def main() -> None:
    arguments = checked(parser_of(__doc__, ["bfloat16", "float32"]))
    rows = []
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        for case in [*EDITS, *PROBES]:
            if DEVICE == "cpu":  # the reference in float64 takes long
                case = replace(case, shape=(1, 256, case.shape[-1]))
            made = edit_calls if isinstance(case, LowRank) else guide_calls
            calls = made(case, dtype)  # checks the results
            if arguments.check:
                print(case.name, dtype, "right on", DEVICE, flush=True)
                continue
            row = measure(calls, arguments.rounds)
            rows.append({"case": case.name, "dtype": str(dtype)} | row)
            print(case.name, dtype, row["microseconds"], flush=True)
    if arguments.output and rows:
        backends = {name: _register.active[name]["CUDA"].backend for name in ("low_rank_", "guide")}
        result = {"environment": environment(), "backends": backends, "rows": rows}
        print(write(result, arguments.output))


if __name__ == "__main__":
    main()
