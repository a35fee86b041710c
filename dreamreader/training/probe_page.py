"""The report of trained probes: accuracy beside controls, by step, reliability, confusion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.jobs.page import job_report
from dreamreader.probes import Card
from dreamreader.report import (
    Charts,
    Curves,
    HeatMap,
    Number,
    Section,
    Series,
    Table,
)
from dreamreader.training.folder import RESULT, TrainingFolder, notes_file
from dreamreader.training.specs import ProbeSpec

Notes = Mapping[str, Any]


def write_report(spec: ProbeSpec, folder: TrainingFolder) -> Path:
    """Writes `report.html` into a complete folder."""
    folder.check()
    sites, taken = folder.need(RESULT)["sites"], folder.need(FINGERPRINT)
    notes = {site: folder.need(notes_file(site)) for site in sites}
    cards = {site: Card.of(each["card"]) for site, each in notes.items()}
    first, card = next(iter(notes.values())), next(iter(cards.values()))
    told = [name for names in card.classes.values() for name in names]
    page = job_report(
        folder.path,
        taken,
        spec.name,
        f"Probes of {len(sites)} sites: {', '.join(told[:12])}.",
        _numbers(cards, first["rows"]),
        [_overview(cards), *(_site(card, notes[site]) for site, card in cards.items())],
    )
    with explain_disk_errors(folder.path):
        return page.write(folder.path / "report.html")


def best(cards: Mapping[str, Card]) -> tuple[str, str, float]:
    """Site, attribute and accuracy (or R2) of the probe that reads best."""
    found = [
        (site, attribute, value)
        for site, card in cards.items()
        for attribute, value in held_out_scores(card).items()
    ]
    return max(found, key=lambda each: each[2])


def held_out_scores(card: Card) -> dict[str, float]:
    """Held-out accuracy by attribute; of a regression R2 by output."""
    if card.task == "regress":
        return {name: value or 0.0 for name, value in card.held_out[""]["r2"].items()}
    return {name: own["accuracy"]["value"] for name, own in card.held_out.items()}


def _numbers(cards: Mapping[str, Card], rows: Mapping[str, int]) -> list[Number]:
    site, attribute, value = best(cards)
    regress = cards[site].task == "regress"
    shown = f"{value:.3f}" if regress else f"{100 * value:.1f} %"
    what = "R2" if regress else "held-out accuracy"
    note = f"{attribute}, {site}" if attribute else site
    unlabelled = rows["all"] - rows["labelled"]
    left = f"{unlabelled:,} had no label" if unlabelled else "all have a label"
    return [Number(shown, what, note), Number(f"{rows['labelled']:,}", "rows", left)]


def _overview(cards: Mapping[str, Card]) -> Section:
    """One line for each probe and control of each site."""
    rows: list[Sequence[object]] = []
    columns: Sequence[str] = ()
    for site, card in cards.items():
        columns, lines = card.table()
        rows += [(site, *line) for line in lines]
    lead = "Measured on prompts that trained nothing and chose nothing."
    return Section("Probes and controls", [Table(("site", *columns), rows)], lead)


def _site(card: Card, notes: Notes) -> Section:
    own = card.section()
    blocks = list(own.blocks)
    charts: list[Any] = []
    for attribute, found in card.held_out.items():
        if card.task != "regress" and len(card.steps) > 1 and card.per_step == "each":
            charts.append(_by_step(card, attribute, found))
        if bins := notes["reliability"].get(attribute):
            charts.append(_reliability(attribute, bins))
        if "confusion" in found:
            charts.append(_confusion(attribute, card.classes[attribute], found["confusion"]))
    return Section(own.title, [*blocks, *([Charts(charts)] if charts else [])], own.lead)


def _by_step(card: Card, attribute: str, found: Notes) -> Curves:
    line = Series("held out", [float(each) for each in card.steps], found["by_step"])
    return Curves(_title("accuracy by step", attribute), [line], "step")


def _reliability(attribute: str, bins: Sequence[tuple[float, float, int]]) -> Curves:
    sure, right, _ = zip(*bins, strict=True)
    ends = [min(sure), max(sure)]
    lines = [Series("probe", sure, right, tone=1), Series("as sure as right", ends, ends, tone=2)]
    return Curves(_title("right, by confidence", attribute), lines, "confidence")


def _confusion(attribute: str, names: Sequence[str], table: Sequence[Sequence[int]]) -> HeatMap:
    shares = [[n / max(sum(row), 1) for n in row] for row in table]
    return HeatMap(_title("told, by truth", attribute), shares, names, names, corner="truth")


def _title(title: str, attribute: str) -> str:
    return f"{attribute}: {title}" if attribute else title
