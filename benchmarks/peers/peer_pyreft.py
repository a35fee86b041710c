"""LoReFT of pyreft beside ours in one process, in pyreft's environment.

Reads one line of JSON (see benchmarks/reft.py) and prints one. Our source comes through PYTHONPATH.
"""

import contextlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

with contextlib.redirect_stdout(sys.stderr):  # pyvene prints what it does not find
    import pyreft_training as training
    from pyreft_ways import Case

import torch  # noqa: E402
from paired import interleaved  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from dreamreader._register import active  # noqa: E402


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    report: dict[str, Any] = {
        "versions": {name: metadata.version(name) for name in ("torch", "pyreft", "pyvene")},
        "backend": active["low_rank"]["CPU"].backend,
        "problems": [],
        "rows": [],
        "training": [],
    }
    for case in job["cases"]:
        report["rows"].append(measured(case, job["rounds"], report["problems"]))
    for name, settings in job["training"].items():
        row = trained(name, job["data"][name], settings, job["rounds"], report["problems"])
        report["training"].append(row)
    print(json.dumps(report), flush=True)


def measured(sizes: dict[str, Any], rounds: int, problems: list[str]) -> dict[str, Any]:
    """Times of the module, forward and with backward, in all ways."""
    print(f"pyreft: {sizes}", file=sys.stderr, flush=True)
    case = Case(**{**sizes, "dtype": getattr(torch, sizes["dtype"])})
    found = case.problems()
    problems += found
    if found:
        return sizes
    calls = case.calls()
    for call in calls.values():
        call()
    times, left_out = interleaved(calls, rounds)
    return sizes | {"times": times, "left_out": left_out}


def trained(
    name: str, file: str, values: dict[str, Any], rounds: int, problems: list[str]
) -> dict[str, Any]:
    """Times of training to the same held-out error."""
    print(f"pyreft: training on {name}", file=sys.stderr, flush=True)
    pairs, settings = training.Pairs(**load_file(file)), training.Settings(**values)
    found = training.compared(pairs, settings)
    row = {"data": name, "width": pairs.base.shape[1], "rows": len(pairs.base), **values}
    if found["dreamreader"]["error"] > found["pyreft"]["error"]:
        problems.append(f"training on {name}: after {2 * settings.steps} steps {found}")
        return row
    steps = {which: int(each["steps"]) for which, each in found.items()}
    times, left_out = interleaved(training.calls(pairs, settings, steps), rounds)
    return row | {"reached": found, "times": times, "left_out": left_out}


if __name__ == "__main__":
    main()
