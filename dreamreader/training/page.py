"""Parts that the reports of trainings share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamreader.report import Code, Facts, Folded, Section

POINTS = 24  # of a curve


def fingerprint_section(folder: Path, taken: Mapping[str, Any]) -> Section:
    """What the numbers depend on, and the spec as it was resolved."""
    facts: list[tuple[str, object]] = [
        (name, taken.get(name, "")) for name in ("digest", "weights", "code")
    ]
    for name, title in (("packages", "packages"), ("machine", "machine (not hashed)")):
        facts.append((title, ", ".join(f"{k} {v}" for k, v in taken.get(name, {}).items())))
    spec = (folder / "spec.yaml").read_text()
    return Section(
        "Fingerprint",
        [Facts(facts), Folded("Spec", [Code(spec)])],
        "Equal digests mean equal settings, weights, code, packages and seeds.",
    )


def thinned(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of equal windows, with the number of the last value of each."""
    count = min(POINTS, len(values))
    ends = [round((n + 1) * len(values) / count) for n in range(count)]
    starts = [0, *ends[:-1]]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)]
    return [float(end) for end in ends], means
