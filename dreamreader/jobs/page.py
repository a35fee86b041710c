"""The part that the reports of all jobs share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamreader.jobs.folder import SPEC
from dreamreader.report import Code, Facts, Folded, Section


def fingerprint_section(folder: Path, taken: Mapping[str, Any], spec: str | None = None) -> Section:
    """What the numbers depend on, and the spec as it was resolved, by default in spec.yaml."""
    facts: list[tuple[str, object]] = [
        (name, taken.get(name, "")) for name in ("digest", "weights", "code")
    ]
    for name, title in (("packages", "packages"), ("machine", "machine (not hashed)")):
        facts.append((title, ", ".join(f"{k} {v}" for k, v in taken.get(name, {}).items())))
    spec = (folder / SPEC).read_text() if spec is None else spec
    return Section(
        "Fingerprint",
        [Facts(facts), Folded("Spec", [Code(spec)])],
        "Equal digests mean equal settings, weights, code, packages and seeds.",
    )
