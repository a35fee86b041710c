"""The report of trained autoencoders: scores beside controls, losses, frequencies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.jobs.page import job_report
from dreamreader.report import Charts, Curves, Number, Section, Series, Table
from dreamreader.training.folder import TrainingFolder
from dreamreader.training.sae_specs import SaeSpec

COLUMNS = {
    "fvu": "FVU",
    "l0": "L0",
    "dead": "dead",
    "shrinkage": "shrinkage",
    "lottery": "lottery",
    "rare_share": "rare share",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "mcc": "MCC",
    "uniqueness": "uniqueness",
}
_TONES = 5
Notes = Mapping[str, Any]


def write_report(spec: SaeSpec, folder: TrainingFolder, notes: Mapping[str, Notes]) -> Path:
    """Writes `report.html` into a complete folder.

    Args:
        notes: of each site, as the training wrote them.
    """
    folder.check()
    count = sum(len(each["autoencoders"]) for each in notes.values())
    trained = [each.title for each in spec.listed()]
    page = job_report(
        folder.path,
        folder.need(FINGERPRINT),
        spec.name,
        f"{count} autoencoders at {len(notes)} sites: {', '.join(trained[:6])}.",
        _numbers(notes),
        [section for site, each in notes.items() for section in _site(site, each, spec)],
    )
    with explain_disk_errors(folder.path):
        return page.write(folder.path / "report.html")


def describe_scores(scores: Notes) -> str:
    """The first numbers in a line."""
    shown = [f"FVU {scores['fvu']:.3f}", f"L0 {scores['l0']:.1f}", f"{scores['dead']:.0%} dead"]
    known = [f"{COLUMNS[n]} {scores[n]:.3f}" for n in ("f1", "mcc") if n in scores]
    return ", ".join([*shown, *known])


def _numbers(notes: Mapping[str, Notes]) -> list[Number]:
    """The best autoencoder by what it explains."""
    every = [
        (site, name, each["scores"])
        for site, own in notes.items()
        for name, each in own["autoencoders"].items()
        if not each["control"]
    ]
    site, name, scores = min(every, key=lambda each: each[2]["fvu"])
    found = [
        Number(
            f"{100 * (1 - scores['fvu']):.1f} %", "of the variance explained", f"{name}, {site}"
        ),
        Number(f"{scores['l0']:.1f}", "active latents of a row", f"{scores['rows']:,} rows"),
        Number(f"{scores['dead']:.1%}", "of latents never fired"),
    ]
    if "f1" in scores:
        best = max(every, key=lambda each: each[2]["f1"])
        found.append(Number(f"{best[2]['f1']:.3f}", "F1 of known features", best[1]))
    return found


def _site(site: str, notes: Notes, spec: SaeSpec) -> list[Section]:
    own = notes["autoencoders"]
    columns = [
        c for c in COLUMNS if any(each["scores"].get(c) is not None for each in own.values())
    ]
    agreement = notes["seed_mcc"]
    rows = []
    for name, each in own.items():
        scores = [_shown(each["scores"].get(column)) for column in columns]
        mcc = agreement.get(each["title"]) if not each["control"] else None
        rows.append((name, *scores, *([_shown(mcc)] if agreement else [])))
    heads = ("autoencoder", *(COLUMNS[c] for c in columns), *(["seed MCC"] if agreement else []))
    table = Table(heads, rows, "Controls were trained as the others were.")
    charts = [_losses(own), _frequencies(own), *_curves(own)]
    return [
        Section(site, [table], _lead(spec)),
        Section(f"{site}: training", [Charts(charts)]),
    ]


def _lead(spec: SaeSpec) -> str:
    if spec.known_answers is not None:
        return "Measured on rows that were drawn apart from those of the training."
    if spec.evaluation.store is not None:
        return f"Measured on rows of {Path(spec.evaluation.store).name}, which trained nothing."
    return "Measured on rows of the training; give evaluation.store for others."


def _losses(own: Mapping[str, Notes]) -> Curves:
    lines, highest = [], 0.0
    shown = [each for each in own.items() if not each[1]["control"]][:_TONES]
    for tone, (name, each) in enumerate(shown, 1):
        steps, values = zip(*each["losses"], strict=True)
        highest = max(highest, *values)
        lines.append(Series(name, [float(n) for n in steps], list(values), tone=tone))
    return Curves("loss", lines, "step", y_range=(0.0, highest or 1.0), percent=False)


def _curves(own: Mapping[str, Notes]) -> list[Curves]:
    """Scores along the training, where they were taken."""
    shown = [(n, e) for n, e in own.items() if not e["control"] and e.get("curve")][:_TONES]
    found = []
    for column in ("fvu", "f1", "mcc"):
        lines = [
            Series(
                name,
                [each["trained"] / 1e6 for each in notes["curve"]],
                [each[column] for each in notes["curve"]],
                tone=tone,
            )
            for tone, (name, notes) in enumerate(shown, 1)
            if column in notes["curve"][0]
        ]
        if lines:
            highest = max(1.0, *(value for line in lines for value in line.y))
            found.append(
                Curves(COLUMNS[column], lines, "10^6 rows", y_range=(0.0, highest), percent=False)
            )
    return found


def _frequencies(own: Mapping[str, Notes]) -> Curves:
    lines, highest = [], 1
    shown = [each for each in own.items() if not each[1]["control"]][:_TONES]
    for tone, (name, each) in enumerate(shown, 1):
        histogram = each["scores"]["histogram"]
        edges, counts = histogram["edges"], histogram["counts"]
        middle = [(a + b) / 2 for a, b in zip(edges[:-1], edges[1:], strict=True)]
        highest = max(highest, *counts)
        lines.append(Series(name, middle, [float(n) for n in counts], tone=tone))
    title, label = "latents by frequency", "log10 of the share of rows"
    return Curves(title, lines, label, y_range=(0.0, float(highest)), percent=False)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
