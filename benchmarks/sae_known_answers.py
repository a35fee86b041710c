"""The tables of docs/sae-known-answers.md, from folders that `dreamreader run` wrote.

python benchmarks/sae_known_answers.py SWEEP ... [--curve FOLDER ...]  # results, and the page
python benchmarks/sae_known_answers.py                                 # the page, from results
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paired import RESULTS, environment, write

from dreamreader.fitting.checkpoint import TrainingState
from dreamreader.training import SaeJob
from dreamreader.training.folder import CHECKPOINTS, TrainingFolder

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sae-known-answers.md"
NAME = "sae-known-answers"
Row = dict[str, Any]

COLUMNS: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "F1": (".3f", lambda s: s["f1"]),
    "MCC": (".3f", lambda s: s["mcc"]),
    "uniqueness": (".3f", lambda s: s["uniqueness"]),
    "explained": (".3f", lambda s: 1 - s["fvu"]),
    "L0": (".1f", lambda s: s["l0"]),
    "dead": (".3f", lambda s: s["dead"]),
    "lottery": (".2f", lambda s: s["lottery"]),
    "own L0": (".1f", lambda s: s.get("own_l0")),
    "own explained": (".3f", lambda s: 1 - s["own_fvu"] if "own_fvu" in s else None),
}
CURVE = ("F1", "MCC", "uniqueness", "explained", "L0", "dead")


def read(folder: Path) -> list[Row]:
    """Every autoencoder of a run: its selection, seed, scores, and scores along the training."""
    job, found = SaeJob.of_folder(folder), []
    opened = TrainingFolder(folder)
    sites = SaeJob.notes(opened).values() if opened.is_complete else [stopped(job, folder)]
    for notes in sites:
        for planned in job.autoencoders:
            own = notes["autoencoders"][planned.name]
            scores = {k: v for k, v in own["scores"].items() if k != "histogram"}
            names = ("selection", "d_sae", "k", "l", "score", "rule", "groups")
            spec = {name: getattr(planned.spec, name) for name in names}
            found.append(
                spec
                | {"seed": planned.seed, "scores": scores, "curve": own["curve"]}
                | {"seed_mcc": notes["seed_mcc"].get(planned.title)}
            )
    return found


def stopped(job: SaeJob, folder: Path) -> Row:
    """What the checkpoint of a training that did not end has along its way."""
    (file,) = (folder / CHECKPOINTS).glob("*/training.safetensors")
    points, size = TrainingState.load(file)["state"]["curve"], job.spec.training.batch_size
    found = {}
    for name, own in points["points"].items():
        curve = [{"trained": done * size, **scores} for done, scores in own]
        found[name] = {"curve": curve, "scores": curve[-1]}
    return {"autoencoders": found, "seed_mcc": {}}


def mean(rows: Sequence[Row], column: str) -> str:
    """Mean and standard deviation over seeds."""
    form, value = COLUMNS[column]
    found = [each for row in rows if (each := value(row["scores"])) is not None]
    if not found:
        return "–"
    spread = f" ± {statistics.stdev(found):{form}}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):{form}}{spread}"


def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(row)} |" for row in rows]


def sweep(rows: Sequence[Row]) -> list[str]:
    """By l, for the score that was swept whole."""
    body = []
    for chosen in ("TopK", "BatchTopK"):
        own = [row for row in rows if row["selection"] == chosen]
        body.append([chosen, "", *(mean(own, column) for column in COLUMNS)])
    sampled = [row for row in rows if row["score"] == "l2"]
    for rule in ("top", "sampled"):
        for l in sorted({row["l"] for row in sampled if row["rule"] == rule}):  # noqa: E741
            own = [row for row in sampled if (row["rule"], row["l"]) == (rule, l)]
            pool = own[0]["k"] * l
            name = "all" if pool >= own[0]["d_sae"] else f"{l:g}"
            body.append([f"l2, {rule}", name, *(mean(own, column) for column in COLUMNS)])
    return lines(["selection", "l", *COLUMNS], body)


def scores(rows: Sequence[Row]) -> list[str]:
    """By score and rule, at the values of l where all were trained."""
    sampled = [row for row in rows if row["score"]]
    kinds = list(dict.fromkeys((row["score"], row["rule"]) for row in sampled))
    values = [
        l
        for l in sorted({row["l"] for row in sampled})  # noqa: E741
        if {(row["score"], row["rule"]) for row in sampled if row["l"] == l} == set(kinds)
    ]
    columns = ("F1", "MCC", "explained", "dead")
    body = []
    for score, rule in kinds:
        own = [row for row in sampled if (row["score"], row["rule"]) == (score, rule)]
        cells = [mean([row for row in own if row["l"] == l], c) for c in columns for l in values]  # noqa: E741
        body.append([score, rule, *cells])
    return lines(["score", "rule", *(f"{c}, l={l:g}" for c in columns for l in values)], body)  # noqa: E741


def curve(rows: Sequence[Row]) -> list[str]:
    """By rows of training."""
    body = []
    for row in rows:
        name = "Matryoshka BatchTopK" if row["groups"] else row["selection"]
        for point in row["curve"]:
            cells = [mean([{"scores": point}], column) for column in CURVE]
            body.append([name, f"{point['trained'] / 1e6:.1f} M", *cells])
    return lines(["selection", "rows", *CURVE], body)


def written(text: str, result: Row) -> str:
    """The page with its tables."""
    parts = {"sweep": sweep, "scores": scores, "curve": curve}
    for name, table in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        rows = result["curve" if name == "curve" else "sweep"]
        if begin in text and rows:
            head, rest = text.split(begin)
            text = head + begin + "\n".join(table(rows)) + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, nargs="*", help="folders of the sweep, one by seed")
    parser.add_argument("--curve", type=Path, nargs="*", default=[], help="folders with curves")
    given = parser.parse_args()
    path = RESULTS / f"{NAME}-cpu.json"
    result = json.loads(path.read_text()) if path.is_file() else {"sweep": [], "curve": []}
    if given.sweep or given.curve:
        result |= {"benchmark": NAME, "environment": environment()}
        for name, folders in (("sweep", given.sweep), ("curve", given.curve)):
            if folders:
                result[name] = [row for folder in folders for row in read(folder)]
        write(result, NAME)
    PAGE.write_text(written(PAGE.read_text(), result))


if __name__ == "__main__":
    main()
