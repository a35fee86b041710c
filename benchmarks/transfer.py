"""Runs every spec examples/mapping/transfer-*.yaml, and puts what it found into docs/mapping.md.

python benchmarks/transfer.py [--only transfer-colour] [--runs DIR] [--write]
"""

import argparse
import json
import sys
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from paired import RESULTS, environment, write

from dreamreader.experiments import Experiment, Results, load_results
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.pages.transfer import TransferPage
from dreamreader.mapping import ActivationMap

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mapping.md"
START, END = "<!-- transfer -->", "<!-- /transfer -->"
STILL = ("unedited", "target prompt")


def main() -> int:
    options = parse()
    specs = sorted((ROOT / "examples" / "mapping").glob("transfer-*.yaml"))
    file = RESULTS / "transfer-cpu.json"
    found = json.loads(file.read_text())["specs"] if file.is_file() else {}
    for spec in specs:
        if not options.only or spec.stem in options.only:
            found[spec.stem] = run(spec, options.runs / spec.stem)
            known = {name: each for name, each in sorted(found.items())}
            write({"benchmark": "transfer", "environment": environment(), "specs": known}, file)
            print(table({spec.stem: found[spec.stem]}), flush=True)
    if options.write:
        text = PAGE.read_text()
        head, tail = text.split(START)[0], text.split(END)[1]
        PAGE.write_text(f"{head}{START}\n\n{table(found)}\n{END}{tail}")
    return 0


def run(spec: Path, folder: Path) -> dict[str, Any]:
    """What a spec found; a run that is in its folder already is read."""
    if (folder / "rows.parquet").is_file():
        results = load_results(folder)
    else:
        results = Experiment.from_file(spec).run(folder, progress=False)
    page = page_of(results)
    assert isinstance(page, TransferPage)
    lines: list[dict[str, Any]] = []
    for part in by_cell(results):
        lines += [each for each in lines_of(part) if each not in lines]
    return {
        "prompts": len({row["item"] for row in results.rows}),
        "rows": len(results.rows),
        "effect": page.effect,
        "lines": lines,
    }


def by_cell(results: Results) -> list[Results]:
    """The rows of each cell, all with those that are not edited."""
    cells = dict.fromkeys(row["cell"] for row in results.of("native"))
    return [
        replace(results, rows=[row for row in results.rows if row["cell"] in (None, cell)])
        for cell in cells
    ]


def lines_of(results: Results) -> list[dict[str, Any]]:
    """Every condition of one cell at its best strength."""
    page = page_of(results)
    assert isinstance(page, TransferPage)
    shares, scores, cell = page.shares(), map_scores(results), results.of("native")[0]["cell"]
    lines = []
    for line in page.lines():
        share = shares.get(line.label)
        effects = {name: value.as_dict() for name, value in line.columns.items()}
        still = line.label in STILL
        lines.append(
            {
                "condition": line.label,
                "setting": dict(line.setting) | ({} if still else {"cell": cell}),
                "share": None if share is None or isnan(share.value) else share.as_dict(),
                "effects": effects,
                "fvu": scores.get(line.label, []),
            }
        )
    return lines


def map_scores(results: Results) -> dict[str, list[float]]:
    """FVU on held-out prompts of each map, site by site."""
    method: Any = results.spec.method
    folder = results.folder.path
    sites = results.cell(results.of("native")[0]).sites
    return {
        name: [
            ActivationMap.load(method.map_file(folder, name, site)).card.scores["fvu"]
            for site in sites
        ]
        for name in method.named_maps
    }


def table(found: dict[str, Any]) -> str:
    """A table for each spec: the effect of each condition, and its share of the native one."""
    parts = []
    for name, each in sorted(found.items()):
        head = f"**`examples/mapping/{name}.yaml`**, {each['prompts']} prompts"
        known = {line["setting"].get("cell") for line in each["lines"]} - {None}
        lines = ["| condition | strength | effect | others kept | share of native | FVU |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for line in each["lines"]:
            effects, strength = line["effects"], line["setting"].get("strength")
            where, fvu = line["setting"].get("cell"), line.get("fvu")
            fvu = each["fvu"].get(line["condition"], []) if fvu is None else fvu
            cells = [
                line["condition"] + (f", `{where}`" if where and len(known) > 1 else ""),
                "" if strength is None else f"{strength:g}",
                interval(effects[each["effect"]]),
                interval(effects.get("others_kept")),
                "" if line["condition"] in STILL else interval(line["share"]),
                ", ".join(f"{value:.2f}" for value in fvu),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join([head, "", *lines]))
    return "\n\n".join(parts) + "\n"


def interval(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What is left of an effect after a map.")
    parser.add_argument("--only", nargs="+", default=[], help="names of specs")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/mapping.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
