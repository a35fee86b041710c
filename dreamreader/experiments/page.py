"""The report of a run: conditions, what the method found, pictures, what fired, the fingerprint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamreader.experiments.results import Results, axis_values, interval, said
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.jobs.page import fingerprint_section
from dreamreader.report import (
    Charts,
    Curves,
    Folded,
    Gallery,
    Numbers,
    Picture,
    Report,
    Section,
    Series,
    Table,
)

if TYPE_CHECKING:
    from dreamreader.stats import Interval

COLUMNS = 8  # pictures in a line
TONES = 5


def write_report(results: Results) -> Path:
    """Writes `report.html` into the run folder."""
    from dreamreader._files import explained

    with explained(results.folder.path):
        return build(results).write(results.folder.path / "report.html")


def build(results: Results) -> Report:
    """The report of a complete run."""
    spec = results.spec
    taken = results.folder.need(FINGERPRINT)
    sections = [
        _overview(results),
        *spec.method.sections(results),
        *_pictures(results),
        *_fired(results.folder.firing()),
        fingerprint_section(results.folder.path, taken),
    ]
    return Report(
        spec.name,
        f"Method {spec.method.kind} on {spec.subject.model}: {len(results.rows):,} rows under "
        f"{len(results.conditions)} conditions.",
        opening=[Numbers(numbers)] if (numbers := spec.method.numbers(results)) else [],
        sections=sections,
        footer=[("fingerprint", str(taken.get("digest", ""))[:16])],
    )


def _overview(results: Results) -> Section:
    shown = results.numbers[:8]
    rows = []
    for condition in results.conditions:
        found = results.of(condition)
        cells = [said(interval(row.get(name) for row in found)) for name in shown]
        rows.append((condition.replace("_", " "), len(found), *cells))
    return Section(
        "Conditions",
        [Table(("condition", "rows", *shown), rows, "Means with 95 % intervals over all rows.")],
    )


def _pictures(results: Results) -> list[Section]:
    """The same prompts and seeds under every condition, changed rows where the method says."""
    wanted = results.spec.method.shown(results)
    lines = []
    for condition in results.conditions:
        found = results.of(condition)
        first = {name: found[0].get(name) for name in ("cell", "strength")} | dict(wanted)
        # what a condition has no column for, such as the rank of a difference of means, is no bar
        chosen = [r for r in found if all(r.get(k) in (None, v) for k, v in first.items())] or found
        pictures = [picture(results, row) for row in chosen[:COLUMNS]]
        if pictures and all(pictures):
            lines.append((condition.replace("_", " "), pictures))
    if not lines:
        return []
    width = min(len(pictures) for _, pictures in lines)
    gallery = Gallery([(name, pictures[:width]) for name, pictures in lines])
    where = ", ".join(f"{name} {value}" for name, value in wanted.items())
    lead = "The first rows of every condition, not picked."
    return [Section("Pictures", [gallery], lead + (f" Changed rows: {where}." if where else ""))]


def picture(results: Results, row: Mapping[str, Any], kind: str = "images") -> Picture | None:
    """The picture of a row for a gallery, with the colour that was read below it."""
    image = results.image(row, kind)
    if image is None:
        return None
    return Picture(image, f"{row['prompt']} (seed {row['seed']})", str(row.get("color") or ""))


def axis_section(results: Results, axis: str, condition: str, title: str) -> Section:
    """Every metric over one axis as a curve, and a line of pictures for every value."""
    rows = results.of(condition)
    values = axis_values(rows, axis)
    numeric = [value for value in values if isinstance(value, int | float)]
    blocks: list[Any] = []
    if len(numeric) > 1:
        blocks.append(
            Charts([_curve(results, name, axis, {condition: rows}) for name in _few(results)])
        )
    lines = []
    for value in values:
        chosen = [row for row in rows if row.get(axis) == value][:COLUMNS]
        pictures = [picture(results, row) for row in chosen]
        if pictures and all(pictures):
            lines.append((f"{axis} {value}", pictures))
    if lines:
        width = min(len(pictures) for _, pictures in lines)
        blocks.append(Gallery([(name, pictures[:width]) for name, pictures in lines]))
    return Section(title, blocks)


def curves(results: Results, axis: str, lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Charts:
    """A chart for each metric, with a line for each set of rows."""
    return Charts([_curve(results, name, axis, lines) for name in _few(results)])


def _few(results: Results) -> list[str]:
    return results.numbers[:6]


def _curve(
    results: Results, name: str, axis: str, lines: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Curves:
    series, every = [], []
    for number, (label, rows) in enumerate(lines.items()):
        ticks = [v for v in axis_values(rows, axis) if isinstance(v, int | float)]
        points = [interval(r.get(name) for r in rows if r.get(axis) == x) for x in ticks]
        kept = [(x, point) for x, point in zip(ticks, points, strict=True) if point.n]
        every += [point for _, point in kept]
        series.append(_series(label, kept, number % TONES + 1))
    truth = all(isinstance(r.get(name), bool | None) for rows in lines.values() for r in rows)
    low = min([0.0, *(point.low for point in every)])
    high = max([1.0 if truth else 1e-9, *(point.high for point in every)])
    return Curves(name.replace("_", " "), series, axis, y_range=(low, high), percent=truth)


def _series(label: str, points: Sequence[tuple[float, "Interval"]], tone: int) -> Series:
    return Series(
        label.replace("_", " "),
        [x for x, _ in points],
        [each.value for _, each in points],
        [each.low for _, each in points],
        [each.high for _, each in points],
        tone,
    )


def _fired(units: Sequence[Sequence[Mapping[str, Any]]]) -> list[Section]:
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
