"""Gathers what jobs of `examples/sae/sampling-*.yaml` measured: a table by selection, and JSON.

python benchmarks/sae_sampling.py RUN [RUN ...] [--out benchmarks/results/sae-sampling-unet.json]

Runs of one spec with other seeds are taken together: means over seeds, and the largest deviation.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from paired import environment, write

from dreamreader.sae import SparseAutoencoder
from dreamreader.sae.matching import mean_correlation
from dreamreader.training import SaeJob

COLUMNS = {
    "fvu": "FVU",
    "fvu_in_training": "FVU as trained",
    "l0": "L0",
    "dead": "dead",
    "auroc_1": "AUROC, 1",
    "auroc_5": "AUROC, 5",
    "absorbed": "absorbed",
    "recovered": "recovered",
    "lottery": "lottery",
    "mcc": "seed MCC",
}


def numbers(scores: dict[str, Any]) -> dict[str, float | None]:
    """One number for each column."""
    probes = scores.get("probes", {})
    found = {name: scores.get(name) for name in COLUMNS}
    found |= {f"auroc_{k}": each["auroc"] for k, each in probes.items()}
    return found | {"recovered": scores.get("splice", {}).get("recovered")}


def gather(runs: list[Path]) -> dict[str, Any]:
    """What each selection gave, over the seeds of all runs."""
    found: dict[str, list[dict[str, float | None]]] = {}
    decoders: dict[str, list[torch.Tensor]] = {}
    baseline: dict[str, float | None] = {}
    for run in runs:
        (file,) = (run / "autoencoders").glob("*.json")
        notes = json.loads(file.read_text())
        for each in notes["autoencoders"].values():
            name = each["title"] + (f", {each['control']}" if each["control"] else "")
            found.setdefault(name, []).append(numbers(each["scores"]))
            sae = SparseAutoencoder.load(run / each["file"])
            decoders.setdefault(name, []).append(sae.W_dec.detach())
        if notes.get("activations"):
            baseline = numbers(notes["activations"])
    lines = {}
    for name, listed in found.items():
        lines[name] = {}
        for column in COLUMNS:
            values = [each[column] for each in listed if each.get(column) is not None]
            if values:
                mean = sum(values) / len(values)
                lines[name][column] = {"mean": mean, "spread": max(abs(v - mean) for v in values)}
        if len(decoders[name]) > 1:
            mcc = mean_correlation(*decoders[name][:2])
            lines[name]["mcc"] = {"mean": mcc, "spread": 0.0}
        lines[name]["seeds"] = len(listed)
    spec = SaeJob.of_folder(runs[0]).spec
    settings = {
        "training": spec.training.model_dump(),
        "evaluation": spec.evaluation.model_dump(),
        "site": spec.sites,
        "data": None if spec.data is None else spec.data.model_dump(exclude_none=True),
        "subject": None if spec.subject is None else spec.subject.model_dump(),
        "pipeline": dict(spec.pipeline),
    }
    if settings["data"] and "file" in settings["data"]:
        settings["data"]["file"] = Path(settings["data"]["file"]).name
    return {"settings": settings, "activations": baseline, "autoencoders": lines}


def table(found: dict[str, Any]) -> str:
    """The lines as Markdown."""
    lines = found["autoencoders"]
    there = [c for c in COLUMNS if any(c in each for each in lines.values())]
    rows = ["| selection | " + " | ".join(COLUMNS[c] for c in there) + " |"]
    rows.append("| --- |" + " ---: |" * len(there))
    for name, each in lines.items():
        cells = [f"{each[c]['mean']:.3g}" if c in each else "–" for c in there]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = gather(given.runs)
    print(table(found))
    if given.out is not None:
        write(given.out, {"benchmark": "sae sampling", "environment": environment(), **found})


if __name__ == "__main__":
    main()
