"""Maps between all sites of two models: runs specs of `examples/mapping`, and gathers their scores.

python benchmarks/map_matrix.py [SPEC ...] [--runs FOLDER] [--out FILE.json]

A spec runs in this process, so that its time and memory are known; a run that is complete is read.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from paired import environment, write

from dreamreader.training import MapMatrixJob
from dreamreader.training.map_matrix_page import best_pairs

ROOT = Path(__file__).parents[1]
SPECS = ("matrix", "matrix-dit")
NAMES = ("fvu", "fvu_scalar", "r2", "cosine", "cka_source", "cka", "retrieval", "p")


def measure(spec: Path, out: Path) -> dict[str, Any]:
    """Runs a spec, and gives its scores with what it took."""
    job = MapMatrixJob.from_file(spec)
    began, used = time.perf_counter(), time.process_time()
    found = job.run(out)
    took = {
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    pairs = [
        {
            **{name: each[name] for name in ("source", "target", "rows")},
            **{name: round(each[name], 4) for name in NAMES},
            "random_fvu": round(each["random"]["median"], 3),
            "lambda": each["settings"].get("lambda"),
        }
        for each in found["pairs"]
    ]
    return {**took, "prompts": found["prompts"], "sites": found["sites"], "pairs": pairs}


def table(found: dict[str, Any]) -> list[str]:
    """Lines in Markdown: of each target site the best source, and its own name where it has one."""
    lines = ["| target | best source | FVU | R2 | cosine | CKA | top-1 |", "|" + " --- |" * 7]
    for each in best_pairs(found):
        shown = [each[name] for name in ("fvu", "r2", "cosine", "cka_source", "retrieval")]
        cells = [f"`{each['target']}`", f"`{each['source']}`", *(f"{value:.2f}" for value in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/map-matrix-cpu.json")
    asked = parser.parse_args()
    content: dict[str, Any] = {"specs": {}}
    if asked.out.is_file():
        content |= json.loads(asked.out.read_text())
    content |= {"benchmark": "map matrix", "environment": environment()}
    for name in asked.specs:
        found = measure(ROOT / "examples/mapping" / f"{name}.yaml", asked.runs / name)
        content["specs"][name] = found
        print(f"{name}: {found['seconds']} s, {found['processor_seconds']} s of processor")
        print("\n".join(table(found)))
        write(content, asked.out)


if __name__ == "__main__":
    main()
