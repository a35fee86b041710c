"""Gathers what jobs of `examples/sae/sampling-*.yaml` measured: a table by selection, and JSON.

python benchmarks/sae_sampling.py RUN [RUN ...] [--out FILE.json]

Runs of parts of one spec, and of other seeds, are taken together: means over seeds, and the largest
deviation.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from paired import environment, write

from dreamreader.sae import SparseAutoencoder
from dreamreader.sae.matching import mean_correlation
from dreamreader.store.store import Store
from dreamreader.training import SaeJob
from dreamreader.training.sae_rows import StoreSource
from dreamreader.training.sae_specs import SaeSpec
from dreamreader.training.sae_splice import SpliceTest, harvest_of, splice_numbers

SAID = ("d=", "k=", "normalise=", "threshold_rule=")  # words of a title that settings say

SPLICED = ("clean", "zero", "spliced", "recovered")  # of the scores of a splice

COLUMNS = {
    "fvu": "FVU",
    "fvu_in_training": "FVU as trained",
    "l0": "L0",
    "dead": "dead",
    "auroc_1": "AUROC, 1",
    "auroc_5": "AUROC, 5",
    "absorbed": "absorbed",
    "spliced": "spliced",
    "recovered": "recovered",
    "lottery": "lottery",
    "mcc": "seed MCC",
}


def numbers(scores: dict[str, Any]) -> dict[str, float | None]:
    """One number for each column."""
    probes = scores.get("probes", {})
    found = {name: scores.get(name) for name in COLUMNS}
    if found["fvu_in_training"] is None:  # TopK keeps the same at inference
        found["fvu_in_training"] = found["fvu"]
    found |= {f"auroc_{k}": each["auroc"] for k, each in probes.items()}
    splice = scores.get("splice", {})
    return found | {name: splice.get(name) for name in SPLICED}


def splices(run: Path, count: int) -> SpliceTest:
    """A test with prompts from all over the store of a run, whose first ones may be alike."""
    source = SaeJob.of_folder(run).source()
    assert isinstance(source, StoreSource)
    store, (site,) = source.store, source.sites
    samples = [each for unit in store.units for each in store.samples(unit)["prompt"].to_pylist()]
    prompts = samples[:: max(1, len(samples) // count)][:count]
    reader, rows = harvest_of(store).job.reader, next(source.held_out(site))
    return SpliceTest(reader, site, prompts, mean=rows.mean(0))


def gather(runs: list[Path], splice: int = 0) -> dict[str, Any]:
    """What each selection gave, over the seeds of all runs.

    Args:
        splice: prompts that are spliced now, in place of those that the runs took.
    """
    test = splices(runs[0], splice) if splice else None
    found: dict[str, list[dict[str, float | None]]] = {}
    decoders: dict[str, list[torch.Tensor]] = {}
    baseline: dict[str, float | None] = {}
    for run in runs:
        (file,) = (run / "autoencoders").glob("*.json")
        notes = json.loads(file.read_text())
        for each in notes["autoencoders"].values():
            words = [w for w in each["title"].split() if not w.startswith(SAID)]
            name = " ".join(words) + (f", {each['control']}" if each["control"] else "")
            found.setdefault(name, []).append(numbers(each["scores"]))
            sae = SparseAutoencoder.load(run / each["file"])
            if test is not None:
                scores = splice_numbers(test.score(sae))
                found[name][-1] |= {column: scores[column] for column in SPLICED}
            decoders.setdefault(name, []).append(sae.W_dec.detach())
        if notes.get("activations"):
            baseline = numbers(notes["activations"])
    lines = {}
    for name, listed in found.items():
        lines[name] = {}
        for column in (*COLUMNS, "clean", "zero"):
            values = [value for each in listed if (value := each.get(column)) is not None]
            if values:
                lines[name][column] = spread(values)
        pairs = list(itertools.combinations(decoders[name], 2))
        if pairs:
            lines[name]["mcc"] = spread([mean_correlation(a, b) for a, b in pairs])
        lines[name]["seeds"] = len(listed)
    return {
        "settings": settings_of(SaeJob.of_folder(runs[0]).spec),
        "activations": baseline,
        "autoencoders": lines,
    }


def spread(values: list[float]) -> dict[str, float]:
    """The mean, and the largest deviation from it."""
    mean = sum(values) / len(values)
    return {"mean": mean, "spread": max(abs(v - mean) for v in values)}


def settings_of(spec: SaeSpec) -> dict[str, Any]:
    """How autoencoders of a spec were trained, and what recorded their rows."""
    first = spec.listed()[0]
    found: dict[str, Any] = {
        "autoencoders": {name: getattr(first, name) for name in ("d_sae", "k", "normalise", "aux")},
        "training": spec.training.model_dump(),
        "evaluation": spec.evaluation.model_dump(),
        "site": spec.sites,
        "data": None if spec.data is None else spec.data.model_dump(exclude_none=True),
        "subject": None if spec.subject is None else spec.subject.model_dump(),
        "pipeline": dict(spec.pipeline),
    }
    if spec.store is not None:
        store = Store(spec.store)
        (job,) = store.manifest.jobs
        assert job.spec is not None
        found |= {name: job.spec[name] for name in ("data", "subject", "pipeline")}
        found["rows recorded"] = store.rows
    if found["data"] and found["data"].get("file"):
        found["data"] = {**found["data"], "file": Path(found["data"]["file"]).name}
    return found


def table(found: dict[str, Any]) -> str:
    """The lines as Markdown."""
    lines = found["autoencoders"]
    there = [c for c in COLUMNS if any(c in each for each in lines.values())]
    rows = ["| selection | " + " | ".join(COLUMNS[c] for c in there) + " |"]
    rows.append("| --- |" + " ---: |" * len(there))
    for name, each in lines.items():
        cells = [cell(each[c]) if c in each else "–" for c in there]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def cell(value: dict[str, float]) -> str:
    shown = f"{value['mean']:.3g}"
    return f"{shown} ± {value['spread']:.2g}" if value["spread"] else shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--splice", type=int, default=0, help="prompts that are spliced now")
    given = parser.parse_args()
    found = gather(given.runs, given.splice)
    print(table(found))
    if given.out is not None:
        write({"benchmark": "sae sampling", "environment": environment(), **found}, given.out)


if __name__ == "__main__":
    main()
