"""A training step of a sparse autoencoder beside dictionary_learning, SAELens and sparsify.

    python benchmarks/sae_training.py [--rounds 9] [--threads 2] [--peers sparsify] [--write]

Each peer runs in an environment of its own (peers/), and so that both are timed in one process,
ours runs there too, from this checkout. Both begin with the same weights and have the same loss,
optimiser and constraints; no time is printed unless their losses agree over several steps.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from paired import environment, summary, write

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
GOALS = {"dictionary_learning": 5.0, "saelens": 5.0, "sparsify": 2.0}
TOKENS, K = 4096, 64
CASES = [
    {"d_in": d_in, "d_sae": d_sae, "k": K, "tokens": TOKENS, "dtype": dtype}
    for d_in, d_sae in ((768, 4096), (1280, 16384))
    for dtype in ("float32", "bfloat16")
]


def ask(peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Has one peer and ours measured in the environment of the peer."""
    sys.path.insert(0, str(PEERS))
    from run import interpreter

    job = {
        "peer": peer,
        "cases": CASES,
        "rounds": options.rounds,
        "threads": options.threads,
    }
    python = options.python or interpreter(f"sae_{peer}", options.cache)
    done = subprocess.run(
        [str(python), str(PEERS / "peer_sae_training.py")],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"{peer} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def finish(row: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of both, and how many times as fast ours is."""
    times, left_out = row.pop("times"), row.pop("left_out")
    return row | {
        "milliseconds": {name: summary([1e3 * t for t in each]) for name, each in times.items()},
        "speedup": summary(times["peer"], times["dreamreader"]),
        "goal": GOALS[row["peer"]],
        "rounds": len(times["peer"]),
        "rounds_left_out": left_out,
    }


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    name = f"{row['peer']:20s} {row['d_in']} -> {row['d_sae']} {row['dtype']}"
    own, peer = (row["milliseconds"][each]["median"] for each in ("dreamreader", "peer"))
    ratio = row["speedup"]
    print(
        f"{name:48s} {peer:8.0f} ms, ours {own:7.0f} ms, {ratio['median']:.2f} "
        f"[{ratio['q20']:.2f}, {ratio['q80']:.2f}] times as fast, goal {row['goal']:g}"
    )
    if row["rounds_left_out"] == -1:
        print("  too few quiet rounds: other processes ran, so these figures say little")


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    rows, versions, problems = [], {}, []
    for peer in options.peers:
        report = ask(peer, options)
        versions[peer] = report["version"]
        for row in report["rows"]:
            if "problem" in row:
                problems.append(f"{row['d_in']} -> {row['d_sae']} {row['dtype']}: {row['problem']}")
                continue
            rows.append(finish(row))
            show(rows[-1])
    for each in problems:
        print("no time:", each, file=sys.stderr)
    if (options.write or options.output) and rows:
        result = {
            "benchmark": "sae_training",
            "environment": environment(),
            "peers": versions,
            "rows": rows,
        }
        print(write(result, options.output or "sae-training"))
    return 1 if problems else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peers", nargs="+", choices=list(GOALS), default=list(GOALS))
    default = (
        Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dreamreader" / "peers"
    )
    parser.add_argument("--cache", type=Path, default=default, help="environments of the peers")
    parser.add_argument("--python", type=Path, help="an environment that has the peer, instead")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--output", type=Path, help="file to write instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
