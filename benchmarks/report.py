"""The README's table of benchmark figures, from the JSON files in benchmarks/results/.

python benchmarks/report.py            # prints the table
python benchmarks/report.py --write    # puts it between the marks in README.md
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks -->\n", "<!-- /benchmarks -->"

OPS = {
    "masked_steer": "steer every second token",
    "ablate": "project out a direction",
    "three": "steer, project, clamp at once",
}
ENGINE = {
    "noop": "a no-op edit on every attention",
    "record": "recording every attention at every step",
    "steer": "steering every attention",
    "sweep_batch": "a sweep of strengths in one batch, beside a plain batch",
}


def table() -> str:
    """The tables of all results, with the machine and commit of each."""
    parts = [ops(each) for each in found("ops-*.json")]
    parts += [engine(each) for each in found("engine-*.json")]
    parts += [attention(each) for each in found("attention-*.json")]
    parts += [directions(each) for each in found("directions-*.json")]
    parts += [peers(each) for each in found("peers-*.json")]
    return "\n".join(parts) if parts else "No results yet.\n"


def found(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def ops(result: dict[str, Any]) -> str:
    """Fused kernels beside plain torch and beside touching the same memory once."""
    lines = []
    for row in result["rows"]:
        if row["kind"] not in OPS:
            continue
        against = "separate" if "separate" in row["speedup"] else "eager"
        lines.append(
            (
                f"{OPS[row['kind']]}, {row['dtype']}",
                f"{row['milliseconds']['fused']:.2f} ms",
                f"{times(row['speedup']['eager'])} faster"
                + (f"; than one by one {times(row['speedup'][against])}" * (against != "eager")),
                times(row["fused_to_rewrite"]),
            )
        )
    shape = "×".join(str(size) for size in result["rows"][0]["shape"][-2:])
    head = (f"Operator, {shape}", "time", "against plain torch", "against rewriting the memory")
    return titled("Operators", result, head, lines)


def engine(result: dict[str, Any]) -> str:
    """What edits and recordings add to generation."""
    plain = result["seconds"]["plain"]["median"]
    lines = [
        (text, f"{percent(result['ratio'][name])}", goal(result, name))
        for name, text in ENGINE.items()
    ]
    title = f"{result['pictures']} pictures, {result['steps']} steps of {result['model']}"
    if result["weights"] == "random":
        title += " with random weights"
    head = (f"{title} ({plain:.1f} s)", "added time", "goal")
    swept = times(result["ratio"]["sweep"])
    tail = (
        f"A sweep of {result['pictures']} strengths as one batch is {swept} as fast as one by one."
    )
    return titled("Engine", result, head, lines) + f"\n{tail}\n"


def attention(result: dict[str, Any]) -> str:
    """Word maps from queries and keys, beside probabilities that are formed."""
    lines = []
    for row in result["rows"]:
        layout = {"tokens": "as models hold them", "dense": "contiguous"}[row["layout"]]
        count = row["sizes"]["words"]
        words = f"{count} word" + "s" * (count > 1)
        peak = row["peak_bytes"]
        lines.append(
            (
                f"{words}, q and k {layout}, {row['dtype']}",
                f"{row['milliseconds']['fused']:.2f} ms",
                f"{times(row['speedup']['eager'])} faster",
                f"{peak['fused'] / 2**20:.2f} MiB, not {peak['eager'] / 2**20:.0f}",
            )
        )
    sizes = result["rows"][0]["sizes"]
    what = f"Word maps, {sizes['heads']} heads × {sizes['queries']} queries × {sizes['keys']} keys"
    head = (
        what,
        "time",
        f"against plain torch (goal {result['goal']:g}×)",
        "memory beside the result",
    )
    return titled("Attention", result, head, lines)


def directions(result: dict[str, Any]) -> str:
    """Fitting a direction beside reading the rows."""
    speed = times(result["speed_of_plain_read"])
    text = (
        f"A direction (means and variances in float64) from {result['rows'] / 1e6:g} M × "
        f"{result['features']} rows of {result['dtype']} takes "
        f"{result['seconds']['fit']['median']:.2f} s: {speed} the speed of a plain read "
        f"(goal {result['goal']:g}×)."
    )
    where = result["environment"]
    note = f"{where['device']}, {where['threads']} threads, commit {where['commit'].rstrip('+')}"
    return f"**Directions** ({note})\n\n{text}\n"


def peers(result: dict[str, Any]) -> str:
    """One job through several libraries."""
    lines = []
    for name, each in result["peers"].items():
        version = each["versions"].get(name)
        lines.append(
            (
                f"{name} {version}" if version else name,
                percent(each["ratio"]["record"]),
                percent(each["ratio"]["steer"]),
            )
        )
    job = result["job"]
    what = f"{len(job['prompts'])} pictures, {job['steps']} steps, {len(job['sites'])} sites"
    head = (f"Added to the plain pipeline, {what}", "recording", "steering")
    return titled("Peers", result, head, lines)


def titled(name: str, result: dict[str, Any], head: tuple[str, ...], lines: list) -> str:
    """A table under the name of the benchmark and the machine it ran on."""
    where = result["environment"]
    rows = [head, ("---",) * len(head), *lines]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    commit = where["commit"].rstrip("+")
    note = f"{where['device']}, {where['threads']} threads, torch {where['versions']['torch']}"
    return f"**{name}** ({note}, commit {commit})\n\n{text}\n"


def times(ratio: dict[str, float]) -> str:
    """A ratio with its 20 and 80 % quantiles."""
    return f"{ratio['median']:.2f}× [{ratio['q20']:.2f}, {ratio['q80']:.2f}]"


def percent(ratio: dict[str, float]) -> str:
    """What a ratio adds, with its 20 and 80 % quantiles."""
    added = [100 * (ratio[key] - 1) for key in ("median", "q20", "q80")]
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*added)


def goal(result: dict[str, Any], name: str) -> str:
    return f"≤ {100 * (result['goals'][name] - 1):.0f} %" if name in result["goals"] else ""


def written(readme: str) -> str:
    """The README with the current table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    if "--write" in sys.argv[1:]:
        path = ROOT / "README.md"
        path.write_text(written(path.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
