"""The report of a run: conditions, what the method found, pictures, what fired, the fingerprint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.pages.base import gallery
from dreamreader.experiments.results import Results, format_interval, mean_interval
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.jobs.page import job_report
from dreamreader.report import Folded, Report, Section, Table


def write_report(results: Results) -> Path:
    """Writes `report.html` into the run folder."""
    with explain_disk_errors(results.folder.path):
        return build(results).write(results.folder.path / "report.html")


def build(results: Results) -> Report:
    """The report of a complete run."""
    spec, page = results.spec, page_of(results)
    return job_report(
        results.folder.path,
        results.folder.need(FINGERPRINT),
        spec.name,
        f"Method {spec.method.kind} on {spec.subject.model}: {len(results.rows):,} rows under "
        f"{len(results.conditions)} conditions.",
        page.numbers(),
        [
            _overview(results),
            *page.sections(),
            *_pictures(results, page.pictured_setting()),
            *firing_sections(results.folder.firing()),
        ],
    )


def summary(results: Results) -> list[str]:
    """What a run found, in lines for the terminal."""
    spec = results.spec
    lines = [f"{spec.name}: {spec.method.kind} on {spec.subject.model}, {len(results.rows):,} rows"]
    for condition in results.conditions:
        means = {name: results.mean(condition, name) for name in results.numbers[:5]}
        shown = ", ".join(f"{name} {format_interval(mean)}" for name, mean in means.items())
        lines.append(f"  {condition.replace('_', ' '):<14} {shown}")
    own = page_of(results).summary()
    lines += [f"{spec.method.kind}:", *own] if own else []
    return [*lines, f"report: {(results.folder.path / 'report.html').resolve()}"]


def _overview(results: Results) -> Section:
    shown = results.numbers[:8]
    rows = []
    for condition in results.conditions:
        found = results.of(condition)
        cells = [format_interval(mean_interval(row.get(name) for row in found)) for name in shown]
        rows.append((condition.replace("_", " "), len(found), *cells))
    return Section(
        "Conditions",
        [Table(("condition", "rows", *shown), rows, "Means with 95 % intervals over all rows.")],
    )


def _pictures(results: Results, wanted: Mapping[str, Any]) -> list[Section]:
    """The same prompts and seeds under every condition, changed rows where the method says."""
    lines = {}
    for condition in results.conditions:
        found = results.of(condition)
        first = {name: found[0].get(name) for name in ("cell", "strength")} | dict(wanted)
        # what a condition has no column for, such as the rank of a difference of means, is no bar
        chosen = [r for r in found if all(r.get(k) in (None, v) for k, v in first.items())]
        lines[condition.replace("_", " ")] = chosen or found
    where = ", ".join(f"{name} {value}" for name, value in wanted.items())
    lead = "The first rows of every condition, not picked."
    lead += f" Changed rows: {where}." if where else ""
    return [Section("Pictures", [each], lead) for each in gallery(results, lines)]


def firing_sections(units: Sequence[Sequence[Mapping[str, Any]]]) -> list[Section]:
    """One line for every edit, over all batches and sites."""
    if not any(units):
        return []
    found: dict[str, dict[str, Any]] = {}
    for number, unit in enumerate(units):
        for line in unit:
            mine = found.setdefault(
                line["request"],
                {"sites": set(), "calls": 0, "batches": set(), "steps": set(), "branches": set()}
                | {"notes": {}, "passed": 0},
            )
            mine["sites"].add(line["site"])
            mine["batches"].add(number)
            mine["calls"] += line["calls"]
            mine["passed"] += line["passed_over"]
            mine["steps"].add(line["steps"])
            mine["branches"] |= set(line["branches"])
            mine["notes"] |= dict.fromkeys(line["notes"])
    rows = [
        (
            _short(request),
            len(each["sites"]),
            len(each["batches"]),
            each["calls"],
            " | ".join(sorted(each["steps"])),
            ", ".join(sorted(each["branches"])),
            "; ".join(each["notes"]),
        )
        for request, each in found.items()
    ]
    columns = ("edit", "sites", "batches", "calls", "steps", "branches", "notes")
    lead = "Every edit, counted while it ran; one that never fires is an error."
    if len(rows) <= 12:
        return [Section("What fired", [Table(columns, rows)], lead)]
    folded = Folded("All edits", [Table(columns, rows)])
    return [Section("What fired", [Table(columns, rows[:12]), folded], lead)]


def _short(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "..."
