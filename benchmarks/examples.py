"""Runs every spec of examples/, and puts what it found into docs/experiments.md.

    python benchmarks/examples.py [--only patch-colour lens] [--write]

A spec whose run takes longer than `LIMIT` is named at the end, and the exit code is 1.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paired import RESULTS, environment, write

from dreamreader.errors import DreamreaderError
from dreamreader.experiments import Experiment
from dreamreader.experiments.page import summary

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "experiments.md"
LIMIT = 600.0  # seconds on two cores
QUICK = 180.0  # seconds
START, END = "<!-- examples -->", "<!-- /examples -->"


def main() -> int:
    options = parse()
    specs = sorted((ROOT / "examples").glob("*.yaml"))
    if options.only:
        specs = [spec for spec in specs if spec.stem in options.only]
    file = RESULTS / "examples-cpu.json"
    found = json.loads(file.read_text())["specs"] if file.is_file() else {}
    for spec in specs:
        with tempfile.TemporaryDirectory() as folder:
            one = run(spec, Path(folder) / "run")
        if one is not None:
            found[spec.stem] = one
            print(f"{spec.stem}: {one['seconds']:.0f} s", *one["lines"], sep="\n", flush=True)
            found = keep(found)
    if options.write:
        PAGE.write_text(page(PAGE.read_text(), found))
    slow = [name for name, each in found.items() if each["seconds"] > LIMIT]
    if slow:
        print(f"longer than {LIMIT:.0f} s: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


def page(text: str, found: dict[str, Any]) -> str:
    """The page with these findings between its marks."""
    head, tail = text.split(START)[0], text.split(END)[1]
    return f"{head}{START}\n\n{table(found)}\n{END}{tail}"


def keep(found: dict[str, Any]) -> dict[str, Any]:
    """Writes what was found so far; findings of specs that are gone are dropped."""
    names = {spec.stem for spec in (ROOT / "examples").glob("*.yaml")}
    kept = {name: each for name, each in sorted(found.items()) if name in names}
    write({"benchmark": "examples", "environment": environment(), "specs": kept}, "examples")
    return kept


def run(spec: Path, folder: Path) -> dict[str, Any] | None:
    """Time, rows and findings of one spec; None where its subject is not here."""
    begun = time.perf_counter()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of the libraries
            results = Experiment.from_file(spec).run(folder)
    except DreamreaderError as error:
        if "zoo fetch" not in str(error):
            raise
        print(f"{spec.stem}: left out, {error}", file=sys.stderr)
        return None
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "rows": len(results.rows), "lines": summary(results)[1:-1]}


def table(found: dict[str, Any]) -> str:
    """The findings as Markdown: what each method says of itself, without means of all metrics."""
    quick = sum(each["seconds"] < QUICK for each in found.values())
    longest = max(found, key=lambda name: found[name]["seconds"])
    parts = [
        f"{quick} of the {len(found)} specs took less than {QUICK / 60:.0f} minutes on two cores, "
        f"`{longest}` {found[longest]['seconds'] / 60:.0f}.\n"
    ]
    for name, each in found.items():
        lines = "\n".join(line.rstrip() for line in findings(each["lines"]))
        parts.append(
            f"**`examples/{name}.yaml`**, {each['rows']:,} rows, {each['seconds']:.0f} s\n\n"
            f"```text\n{lines}\n```\n"
        )
    return "\n".join(parts)


def findings(lines: list[str]) -> list[str]:
    """The lines below that of the method's kind."""
    own = next(n for n, line in enumerate(lines) if not line.startswith(" "))
    return lines[own + 1 :]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="names of specs, without .yaml")
    parser.add_argument("--write", action="store_true", help="put the findings into the docs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
