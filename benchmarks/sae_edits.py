"""Runs the specs of examples/sae that change pictures; their tables go into docs/sae-edits.md.

    python benchmarks/sae_edits.py [--only turn-colour] [--write]

From the root of the repository. What is not complete in runs/ is run, autoencoders first; what is
stopped goes on there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from paired import RESULTS, environment, write

from dreamreader.experiments import Experiment, load_results
from dreamreader.experiments.folder import RunFolder
from dreamreader.experiments.pages import page_of
from dreamreader.training import SaeJob

ROOT = Path(__file__).parents[1]
SPECS, PAGE = ROOT / "examples" / "sae", ROOT / "docs" / "sae-edits.md"
TRAINED = {"shapes-unet": "colour", "shapes-dit": "colour-dit"}
START, END = "<!-- {} -->", "<!-- /{} -->"
NAMES = {
    "success": "both",
    "reached": "colour",
    "others_kept": "all else kept",
    "shape_kept": "shape kept",
    "pixel_distance": "distance",
}


def main() -> int:
    options = parse()
    file = RESULTS / "sae-edits-cpu.json"
    found = json.loads(file.read_text())["specs"] if file.is_file() else {}
    for spec in sorted(SPECS.glob("*-colour*.yaml")):
        if options.only and spec.stem not in options.only:
            continue
        found[spec.stem] = run(spec)
        report = {"benchmark": "sae edits", "environment": environment(), "specs": found}
        write(report, "sae-edits")
        print(spec.stem, *found[spec.stem]["summary"], sep="\n", flush=True)
    if options.write:
        PAGE.write_text(page(PAGE.read_text(), found))
    return 0


def run(spec: Path) -> dict[str, Any]:
    """What one spec found, and how long its pictures took."""
    experiment = Experiment.from_file(spec)
    if not RunFolder(experiment.folder).is_complete:
        trained = TRAINED[experiment.spec.subject.model]
        SaeJob.from_file(SPECS / f"{trained}.yaml").run(progress=False)
        experiment.run(progress=False)
    results = load_results(experiment.folder)
    chosen = page_of(results).chosen
    method = results.spec.method
    return {
        "subject": results.spec.subject.model,
        "site": method.sites,
        "goal": method.choose.goal,
        "rows": len(results.rows),
        "code": results.folder.need_fingerprint()["code"],
        "pooled": [
            {"edit": kind} | {n: chosen.mean(own, n).as_dict() for n in chosen.columns}
            for kind in chosen.kinds
            for own in [chosen.of_kind(kind)]
        ],
        "by_label": chosen.findings(),
        "by_strength": chosen.by_strength(),
        "summary": Experiment.summary(results.folder)[-1 - len(chosen.edits) : -1],
    }


def page(text: str, found: dict[str, Any]) -> str:
    """The page with the tables of each spec between the marks of its name."""
    for name, each in found.items():
        start, end = START.format(name), END.format(name)
        if start in text:
            head, rest = text.split(start)
            text = f"{head}{start}\n\n{tables(each)}\n{end}{rest.split(end)[1]}"
    return text


def tables(found: dict[str, Any]) -> str:
    """By colour, over all colours, and by strength."""
    edits = list(dict.fromkeys(each["edit"] for each in found["by_label"]))
    heads = ["colour", *edits, "latents of the set"]
    by_label: dict[str, list[dict[str, Any]]] = {}
    for each in found["by_label"]:
        by_label.setdefault(each["label"], []).append(each)
    lines = []
    for label, own in by_label.items():
        cells = {each["edit"]: both_parts(each) for each in own}
        latents = ", ".join(map(str, max(own, key=size_of)["latents"]))
        lines.append([label, *(cells.get(edit, "–") for edit in edits), latents])
    pooled = [
        [each["edit"], *(percent_or_number(each[n], n) for n in NAMES)] for each in found["pooled"]
    ]
    far = [
        [each["edit"], f"{each['strength']:g}", *(percent_or_number(each[n], n) for n in NAMES)]
        for each in found["by_strength"]
    ]
    return "\n".join(
        [
            markdown(heads, lines),
            markdown(["all colours", *NAMES.values()], pooled),
            markdown(["edit", "strength", *NAMES.values()], far),
        ]
    )


def size_of(found: dict[str, Any]) -> int:
    return len(found["latents"])


def both_parts(found: dict[str, Any]) -> str:
    """Colour and all else, in per cent, at the chosen strength."""
    colour, kept = (found[name] for name in ("reached", "others_kept"))
    return f"{percent(colour)} / {percent(kept)} at {found['strength']:g}"


def percent(found: dict[str, Any]) -> str:
    value, low, high = (round(100 * found[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def percent_or_number(found: dict[str, Any], name: str) -> str:
    return f"{found['value']:.3f}" if name.endswith("distance") else percent(found)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(each)} |\n" for each in lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names of specs, without .yaml")
    parser.add_argument("--write", action="store_true", help="put the tables into the docs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
