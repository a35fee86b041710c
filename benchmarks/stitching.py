"""Tables of stitched runs from their folders, into docs/stitching.md.

    dreamreader run examples/mapping/stitch-unet-b.yaml --out runs/stitch-unet-b
    python benchmarks/stitching.py stitch-unet-b=runs/stitch-unet-b ... [--write]

Of a spec whose sites were run apart there are several folders, with commas between. A spec that is
not named keeps what was found before.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paired import RESULTS, environment, write

from dreamreader.experiments import load_results
from dreamreader.experiments.pages.stitch import CONTROLS, SETTING, StitchPage

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "stitching.md"
START, END = "<!-- stitched -->", "<!-- /stitched -->"


def main() -> int:
    options = parse()
    file = RESULTS / "stitching-cpu.json"
    found = json.loads(file.read_text())["specs"] if file.is_file() else {}
    for each in options.runs:
        name, _, folders = each.rpartition("=")
        parts = [read(StitchPage(load_results(folder))) for folder in folders.split(",")]
        found[name] = parts[0] | {"lines": [one for part in parts for one in part["lines"]]}
    found = dict(sorted(found.items()))
    if options.runs:
        write({"benchmark": "stitching", "environment": environment(), "specs": found}, "stitching")
    if options.write:
        text = PAGE.read_text()
        head, tail = text.split(START)[0], text.split(END)[1]
        PAGE.write_text(f"{head}{START}\n\n{tables(found)}\n{END}{tail}")
    return 0


def read(page: StitchPage) -> dict[str, Any]:
    """Native successes, and what is left of them under every setting of every pair."""
    results, effect, scores = page.results, page.effect, page.scores()
    spec = results.spec
    lines = []
    for cell in page.cells:
        for name in [each for each in CONTROLS if results.of(each, cell=cell)]:
            lines.append(line(page, name, {"cell": cell}, {}))
        for each in page.settings(cell):
            at = {"cell": cell, **dict(zip(SETTING, each, strict=True))}
            own = scores.get((cell, at["map"], at["fit_prompts"]), {})
            lines.append(line(page, "stitched", at, own))
    return {
        "source": Path(page.method.source.model).name,
        "target": Path(spec.subject.model).name,
        "effect": effect,
        "is_distance": page.is_distance,
        "prompts": len(results.of("unedited")),
        "steps": spec.pipeline.get("num_inference_steps"),
        "native": sum(bool(row[effect]) for row in results.of("unedited")),
        "lines": lines,
    }


def line(page: StitchPage, name: str, at: dict[str, Any], own: Any) -> dict[str, Any]:
    share = page.share(name, **at)
    shown = None if share is None else [share.value, share.low, share.high]
    scores = {each: own.get(each) for each in ("fvu", "r2", "cosine", "cka")}
    if page.is_distance:
        mean = page.results.mean(name, page.effect, **at)
        found = {"distance": [mean.value, mean.low, mean.high]}
    else:
        found = {"hits": sum(bool(row[page.effect]) for row in page.results.of(name, **at))}
    skip = {"skip": page.method.skip} if page.method.skip else {}
    return {"condition": name, **at, **skip, **found, "share": shown, **scores}


def tables(found: dict[str, Any]) -> str:
    """A table for each spec."""
    parts = []
    for name, each in found.items():
        if each.get("is_distance"):
            parts.append(divergences(name, each))
            continue
        right = "right in every attribute" if each["steps"] else "as the model was taught"
        prompts = f"captions, {each['steps']} steps" if each["steps"] else "prompts"
        parts.append(
            f"**{heading(name)}**: {each['source']} into {each['target']}, "
            f"{each['prompts']} {prompts}; {each['native']} of them are {right} without a "
            "stitch\n\n"
            "| pair | map | prompts to fit | right | share of native | FVU |\n"
            "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(map(row, each["lines"])) + "\n"
        )
    return "\n".join(parts)


def divergences(name: str, each: dict[str, Any]) -> str:
    """The table of two language models, whose next tokens are compared."""
    head = (
        f"**{heading(name)}**: {each['source']} into {each['target']}, "
        f"{each['prompts']} prompts\n\n"
        "| pair | map | prompts to fit | KL of next tokens, nats | share recovered | FVU | cosine "
        "| CKA |\n" + "|" + " --- |" * 8 + "\n"
    )
    lines = []
    for one in each["lines"]:
        scores = ("" if one[n] is None else f"{one[n]:.3f}" for n in ("fvu", "cosine", "cka"))
        value, low, high = one["distance"]
        cells = [
            f"`{one['cell']}`",
            label(one),
            str(one.get("fit_prompts", "")),
            f"{value:.2f} ({low:.2f} to {high:.2f})",
            percent(one["share"]),
            *scores,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return head + "\n".join(lines) + "\n"


def heading(name: str) -> str:
    """A spec as the command line has it; a name may end in overrides, after a space."""
    spec, _, overrides = name.partition(" ")
    return f"`examples/mapping/{spec}.yaml{' ' if overrides else ''}{overrides}`"


def label(each: dict[str, Any]) -> str:
    own = each.get("map") or each["condition"].replace("_", " ")
    own += "" if each.get("strength", 1.0) == 1.0 else f", strength {each['strength']:g}"
    return own + (f", skip {each['skip']}" if each.get("skip") else "")


def percent(share: Sequence[float] | None) -> str:
    if share is None:
        return "–"
    return f"{share[0]:.0%} ({share[1]:.0%} to {share[2]:.0%})"


def row(each: dict[str, Any]) -> str:
    own, share = label(each), percent(each["share"])
    fvu = "" if each.get("fvu") is None else f"{each['fvu']:.3f}"
    amount = each.get("fit_prompts", "")
    return f"| `{each['cell']}` | {own} | {amount} | {each['hits']} | {share} | {fvu} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tables of stitched runs.")
    parser.add_argument("runs", nargs="*", help="name=folder[,folder] of complete runs")
    parser.add_argument("--write", action="store_true", help="put the tables into the docs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
