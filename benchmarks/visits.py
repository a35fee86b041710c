"""What one visited site costs: an edited module call as a whole, and the Python around it.

    python benchmarks/visits.py [--rounds 15] [--rows 8192] [--width 1280] [--device cuda]

The first part times one layer with an edit through `Reader.editing` beside the same layer with a
plain forward hook in the fastest of several forms in torch, at a large and a small size; no time is
printed unless the results agree. The second part runs a chain of tiny layers, where nothing but
Python takes time, and gives the microseconds that each visited site adds. Times wait for the
device.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import environment, summary, write
from torch import Tensor, nn

import dreamreader as dr

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GOALS = {"record": 6.0, "edit": 6.0, "first_edit": 60.0, "enter_and_leave": 20.0}
SITES = 64
_synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
SMALL = (4096, 96)  # rows and width of a result that stays in the cache


class Wide(nn.Module):
    """A model of one layer, of which the result is large and the work small, or none."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Call:
    """One layer, its edit and the hooks in plain torch that do the same."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: str, works: bool = True):
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(16, width, dtype=dtype) if works else nn.Identity()
        self.model = Wide(layer).eval().to(device)
        features = 16 if works else width
        self.x = torch.randn(2, rows // 2, features, generator=generator).to(device, dtype)
        self.vector = torch.randn(width, generator=generator).to(device)
        self.reader = dr.Reader(self.model)
        self.edit = dr.Steer("layer", self.vector, alpha=0.5, tokens=range(0, rows // 2, 2))
        mask = torch.zeros(1, rows // 2, 1, dtype=torch.bool, device=device)
        mask[:, ::2] = True
        share, added = mask.to(dtype), (0.5 * self.vector).to(dtype)
        self.forms: dict[str, Callable[[Tensor], Tensor]] = {
            "where": lambda y: torch.where(mask, y + added, y),
            "product": lambda y: y + share * added,
            "addcmul": lambda y: torch.addcmul(y, share, added),
        }

    def bare(self) -> Tensor:
        return self.model(self.x)

    def hooked(self, form: str) -> Callable[[], Tensor]:
        call = self.forms[form]

        def run() -> Tensor:
            handle = self.model.layer.register_forward_hook(lambda m, i, output: call(output))
            try:
                return self.model(self.x)
            finally:
                handle.remove()

        return run

    def wrong(self) -> bool:
        """Whether the edit is not what the plain form gives, up to its rounding."""
        with self.reader.editing(self.edit):
            got = self.model(self.x)
        want = self.hooked("where")()
        step = torch.finfo(want.dtype).eps * want.abs().max()
        return not bool((got - want).abs().max() <= 2 * step)

    def times(self, rounds: int) -> dict[str, list[float]]:
        calls: dict[str, Callable[[], Any]] = {"bare": self.bare}
        calls |= {form: self.hooked(form) for form in self.forms}
        with self.reader.editing(self.edit):
            self.model(self.x)
        found: dict[str, list[float]] = {name: [] for name in [*calls, "ours"]}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(timed(call))
            with self.reader.editing(self.edit):  # entered once for many calls, as a denoiser has
                for _ in range(3):  # the first ones prepare what all others use
                    self.bare()
                found["ours"].append(timed(self.bare))
        return found


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call, and of what it began on a GPU."""
    _synchronize()
    begun = clock()
    call()
    _synchronize()
    return clock() - begun


def whole_calls(options: argparse.Namespace, rows: int, width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each form by dtype, of a linear layer and of one that does nothing."""
    found = {}
    for name, dtype in DTYPES.items():
        of = {}
        for works in (True, False):
            call = Call(rows, width, dtype, options.device, works)
            if call.wrong():
                raise SystemExit(f"no times: in {name} the edit is not what the plain form gives")
            of[works] = call.times(rounds)
        times, alone = of[True], of[False]
        best = min(call.forms, key=lambda form: statistics.median(times[form]))
        found[name] = {
            "best_plain": best,
            "milliseconds": {form: summary(in_ms(each)) for form, each in times.items()},
            "least_milliseconds": {form: min(in_ms(each)) for form, each in times.items()},
            "ratio_to_best_plain": summary(times["ours"], times[best]),
            "edit_alone_milliseconds": {form: min(in_ms(each)) for form, each in alone.items()},
            "edit_alone_gain": {form: min(alone[form]) / min(alone["ours"]) for form in call.forms},
        }
    return found


def in_ms(seconds: list[float]) -> list[float]:
    return [1e3 * each for each in seconds]


class Chain:
    """Many tiny layers, so that a call is Python alone."""

    def __init__(self, device: str) -> None:
        self.layers = [nn.Linear(8, 8) for _ in range(SITES)]
        parts = [nn.Sequential(*self.layers[at : at + 8]) for at in range(0, SITES, 8)]
        self.model = nn.Sequential(*parts).eval().to(device)
        self.x = torch.randn(1, 4, 8).to(device)
        self.reader = dr.Reader(self.model)
        self.vector = torch.randn(8).to(device)

    def run(self) -> Tensor:
        return self.model(self.x)

    def steer(self, alpha: float = 0.1) -> dr.Steer:
        return dr.Steer("*.*", self.vector, alpha=alpha)

    def hooked(self, hook: Callable[..., Any], calls: int) -> float:
        handles = [each.register_forward_hook(hook) for each in self.layers]
        try:
            return self.per_call(calls)
        finally:
            for handle in handles:
                handle.remove()

    def per_call(self, calls: int) -> float:
        self.run()
        return min(timed(self.run, time.thread_time) for _ in range(calls))

    def added(self, calls: int) -> dict[str, float]:
        """Microseconds that each site adds, of one round."""
        bare = self.per_call(calls)
        kept: list[Tensor] = []
        vector = 0.1 * self.vector
        plain = {
            "plain_record": self.hooked(lambda m, i, o: kept.append(o.clone()), calls),
            "plain_edit": self.hooked(lambda m, i, o: o + vector, calls),
        }
        with self.reader.recording("*.*"):
            record = self.per_call(calls)
        with self.reader.editing(self.steer()):
            first = timed(self.run, time.thread_time)
            edit = self.per_call(calls)
        totals = {"record": record, "edit": edit, **plain}
        found = {name: (each - bare) / SITES for name, each in totals.items()}
        found["first_edit"] = (first - edit) / SITES
        found["enter_and_leave"] = self.blocks(calls)
        return {name: 1e6 * each for name, each in found.items()}

    def blocks(self, calls: int) -> float:
        """Seconds of a block with one edit and one call, less those of its first call."""
        edit = dr.Steer("5.5", self.vector, alpha=0.1)

        def block() -> float:
            begun = time.thread_time()
            with self.reader.editing(edit):
                inside = timed(self.run, time.thread_time)
            return time.thread_time() - begun - inside

        return min(block() for _ in range(calls))


def visits(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Microseconds for each visited site on tiny layers, the least of many calls in each round."""
    chain = Chain(options.device)
    rounds = []
    for _ in range(options.rounds):
        gc.collect()
        rounds.append(chain.added(options.calls))
    return {name: summary([each[name] for each in rounds]) for name in rounds[0]}


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        calls = whole_calls(options, options.rows, options.width, options.rounds)
        torch.set_num_threads(1)
        small = whole_calls(options, *SMALL, 20 * options.rounds)
    with torch.no_grad():
        python = visits(options)
    result = {
        "benchmark": "visits",
        "environment": environment() | {"threads": options.threads},
        "rows": options.rows,
        "width": options.width,
        "rounds": options.rounds,
        "calls": calls,
        "small": {"rows": SMALL[0], "width": SMALL[1], "threads": 1, "calls": small},
        "python_microseconds": python,
        "goals": GOALS,
    }
    show(result)
    if not options.dry:
        print(write(result, options.output or "visits"))
    return 0


def show(result: dict[str, Any]) -> None:
    show_calls(result["rows"], result["width"], result["calls"])
    small = result["small"]
    show_calls(small["rows"], small["width"], small["calls"])
    for name, each in result["python_microseconds"].items():
        goal = f"   goal {GOALS[name]:g}" if name in GOALS else ""
        print(f"{name:16s} {each['median']:6.1f} us [{each['q20']:.1f}, {each['q80']:.1f}]{goal}")


def show_calls(rows: int, width: int, calls: dict[str, Any]) -> None:
    print(f"{rows} rows of {width}, milliseconds")
    for name, each in calls.items():
        ratio, alone = each["ratio_to_best_plain"]["median"], each["edit_alone_gain"]
        least = "  ".join(f"{form} {ms:.3f}" for form, ms in each["least_milliseconds"].items())
        print(f"{name:9s} x{ratio:.3f} of {each['best_plain']}; {least}")
        gains = "  ".join(f"{form} {gain:.1f}" for form, gain in alone.items())
        print(
            f"          edit alone {each['edit_alone_milliseconds']['ours']:.3f} ms; gain: {gains}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=40, help="calls of the tiny layers in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--output", type=Path, help="default: in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
