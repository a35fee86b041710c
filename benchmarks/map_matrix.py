"""Maps between all sites of two models: runs specs of `examples/mapping`, and gathers their scores.

python benchmarks/map_matrix.py [SPEC ...] [--runs FOLDER] [--stitched FILE] [--out FILE.json]
    [--set KEY=VALUE ...]

A spec runs in this process, so that its time and memory are known; a run that is complete is read.
`--stitched` is rows.parquet of `examples/mapping/stitch-matrix.yaml`: its success is compared with
the scores of the first spec.
"""

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paired import environment, write

from dreamreader.mapping import correlate_success
from dreamreader.training import MapMatrixJob
from dreamreader.training.map_matrix_page import best_pairs
from dreamreader.training.map_matrix_success import read_success

ROOT = Path(__file__).parents[1]
SPECS = ("matrix", "matrix-dit")
NAMES = ("fvu", "fvu_scalar", "r2", "cosine", "cka_source", "cka", "retrieval", "p")


def measure(spec: Path, out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a spec, and gives its scores with what it took."""
    job = MapMatrixJob.from_file(spec, list(overrides))
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


def predict(found: dict[str, Any], rows: Path) -> dict[str, Any]:
    """Success of stitching by pair of sites, and its rank correlation with each score."""
    one, other = found["sites"]
    success = read_success(rows, (one, other), "scene_right", "ridge", 0.5)
    known = [each for each in found["pairs"] if (each["source"], each["target"]) in success]
    values = np.array([success[each["source"], each["target"]] for each in known])
    signs = {"fvu": -1, "cosine": 1, "cka_source": 1, "retrieval": 1}
    scores = {name: sign * np.array([each[name] for each in known]) for name, sign in signs.items()}
    correlated = correlate_success(scores, values)
    return {
        "pairs": [[*pair, round(value, 4)] for pair, value in success.items()],
        "predicts": {
            name: [round(x, 3) for x in (each.value, each.low, each.high)]
            for name, each in correlated.items()
        },
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines in Markdown: of each target site the best source, and its own name where it has one."""
    lines = ["| target | best source | FVU | R2 | cosine | CKA | top-1 |", "|" + " --- |" * 7]
    for each in best_pairs(found):
        shown = [each[name] for name in ("fvu", "r2", "cosine", "cka_source", "retrieval")]
        cells = [f"`{each['target']}`", f"`{each['source']}`", *(f"{value:.2f}" for value in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def every(found: dict[str, Any], name: str) -> list[str]:
    """Lines in Markdown: a score of every pair, sources down and targets across."""
    sources, targets = found["sites"]
    scores = {(each["source"], each["target"]): each[name] for each in found["pairs"]}
    lines = [f"| | {' | '.join(f'`{each}`' for each in targets)} |"]
    lines.append("|" + " --- |" * (len(targets) + 1))
    for one in sources:
        values = (f"{scores[one, other]:.2f}" for other in targets)
        lines.append(f"| `{one}` | {' | '.join(values)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/map-matrix-cpu.json")
    parser.add_argument("--stitched", type=Path)
    parser.add_argument("--every", nargs="+", default=[], help="scores to show of all pairs")
    parser.add_argument("--set", nargs="+", default=[], help="fields of the specs, key=value")
    asked = parser.parse_args()
    content: dict[str, Any] = {"specs": {}}
    if asked.out.is_file():
        content |= json.loads(asked.out.read_text())
    content |= {"benchmark": "map matrix", "environment": environment()}
    for name in asked.specs:
        found = measure(ROOT / "examples/mapping" / f"{name}.yaml", asked.runs / name, asked.set)
        content["specs"][name] = found
        print(f"{name}: {found['seconds']} s, {found['processor_seconds']} s of processor")
        print("\n".join(table(found)))
        for score in asked.every:
            print("\n".join(["", score, *every(found, score)]))
        if asked.stitched and name == asked.specs[0]:
            content["stitching"] = predict(found, asked.stitched)
        write(content, asked.out)


if __name__ == "__main__":
    main()
