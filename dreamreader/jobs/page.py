"""What the reports of all jobs share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamreader.jobs.folder import SPEC
from dreamreader.report import Code, Facts, Folded, Number, Numbers, Report, Section


def job_report(
    folder: Path,
    taken: Mapping[str, Any],
    title: str,
    lead: str,
    numbers: Sequence[Number],
    sections: Sequence[Section],
) -> Report:
    """The report of a complete job: its numbers, its sections, and what they depend on.

    Args:
        folder: of the job. taken: its fingerprint.
        title, lead: of the page. numbers: said first, in large.
        sections: between these and the fingerprint.
    """
    return Report(
        title,
        lead,
        opening=[Numbers(numbers)] if numbers else [],
        sections=[*sections, fingerprint_section(folder, taken)],
        footer=[("fingerprint", str(taken.get("digest", ""))[:16])],
    )


def fingerprint_section(folder: Path, taken: Mapping[str, Any]) -> Section:
    """What the numbers depend on, and the spec as it was resolved."""
    facts: list[tuple[str, object]] = [
        (name, taken.get(name, "")) for name in ("digest", "weights", "code")
    ]
    for name, title in (("packages", "packages"), ("machine", "machine (not hashed)")):
        facts.append((title, ", ".join(f"{k} {v}" for k, v in taken.get(name, {}).items())))
    spec = (folder / SPEC).read_text()
    return Section(
        "Fingerprint",
        [Facts(facts), Folded("Spec", [Code(spec)])],
        "Equal digests mean equal settings, weights, code, packages and seeds.",
    )
