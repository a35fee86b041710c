"""Timing beside a baseline in one process, and what a result file says about where it was made."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FOREIGN = 0.03  # share of one core that other processes may use in a round that counts


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, most: int | None = None
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each call per round, from `rounds` rounds in which the machine was ours.

    Every second round runs in the opposite order. A round in which other processes took more than
    `FOREIGN` of a core is left out and repeated, up to `most` rounds in all (by default twice
    `rounds`).

    Returns:
        Times by name, and how many rounds were left out. With fewer than three quiet rounds all
        rounds count and the number is -1: such figures say little.
    """
    every: list[tuple[bool, dict[str, float]]] = []
    while sum(quiet for quiet, _ in every) < rounds and len(every) < (most or 2 * rounds):
        order = list(calls) if len(every) % 2 == 0 else list(calls)[::-1]
        begun, busy, own = time.perf_counter(), _busy(), sum(os.times()[:2])
        seconds = {name: _timed(calls[name]) for name in order}
        wall = time.perf_counter() - begun
        foreign = (_busy() - busy) - (sum(os.times()[:2]) - own)
        every.append((foreign / wall <= FOREIGN, seconds))
    counted = [seconds for quiet, seconds in every if quiet]
    left_out = len(every) - len(counted)
    if len(counted) < 3:
        counted, left_out = [seconds for _, seconds in every], -1
    return {name: [each[name] for each in counted] for name in calls}, left_out


def summary(times: list[float], base: list[float] | None = None) -> dict[str, float]:
    """Median and 20/80 % quantiles of times, or of their ratios to a baseline within each round."""
    values = times if base is None else [a / b for a, b in zip(times, base, strict=True)]
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "q20": cuts[0], "q80": cuts[3]}


def environment() -> dict[str, Any]:
    """Device, versions and commit of a result."""
    where = gpu() if torch.cuda.is_available() else {}
    return {
        "device": device(),
        **where,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "diffusers", "dreamreader")
        },
        "commit": _commit(),
    }


def gpu() -> dict[str, Any]:
    """Name of the GPU, and what it reaches at best, for the figures of the same process.

    Returns:
        gpu, cuda, copy_gigabytes_per_second (of a copy of 2 GiB on the device, bytes read and
        written) and gemm_teraflops (bfloat16, 8192 x 8192 x 8192, random values).
    """
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    wide = torch.empty(1 << 30, dtype=torch.int16, device="cuda")
    calls = {"copy": lambda: wide.clone(), "gemm": lambda: a @ a}
    best = {name: min(_timed(call) for _ in range(12)) for name, call in calls.items()}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "copy_gigabytes_per_second": round(2 * wide.numel() * 2 / best["copy"] / 1e9),
        "gemm_teraflops": round(2 * 8192**3 / best["gemm"] / 1e12),
    }


def device() -> str:
    """The processor's name and instruction set, with the number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        name = found.group(1) if found else name
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def write(result: dict[str, Any], target: Path | str) -> Path:
    """Writes a result as JSON; a plain name stands for benchmarks/results/<name>-cpu.json."""
    path = target if isinstance(target, Path) else RESULTS / f"{Path(target).name}-cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _busy() -> float:
    """Seconds that all cores together have worked since the machine started (0 where unknown)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _commit() -> str:
    """The commit that is checked out, with "+" where tracked files differ from it."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "")
