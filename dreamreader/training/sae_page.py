"""The report of trained autoencoders: scores beside controls, losses, frequencies."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.jobs.page import job_report
from dreamreader.report import (
    Charts,
    Curves,
    Folded,
    Number,
    Report,
    Section,
    Series,
    Table,
    Text,
)
from dreamreader.training.folder import TrainingFolder
from dreamreader.training.sae_attributes import K
from dreamreader.training.sae_specs import SaeSpec

COLUMNS = {
    "fvu": "FVU",
    "fvu_in_training": "FVU as trained",
    "l0": "L0",
    "l0_in_training": "L0 as trained",
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
PROBED = {
    **{f"auroc_{k}": f"AUROC, {k} latent{'s' if k > 1 else ''}" for k in K},
    **{f"f1_{k}": f"F1, {k}" for k in K},
    "absorbed": "absorbed",
    "silent": "silent",
}
SPLICED = {
    "spliced": "spliced",
    "recovered": "recovered of zeros",
    "recovered_of_mean": "recovered of the mean",
    "error_kept": "with the error",
    "clean": "as it is",
    "zero": "zeros",
    "mean": "mean",
}
_MEASURES = {
    "cross_entropy": "cross-entropy of a token (natural)",
    "pixel_distance": "distance of final pictures from those of the model as it is (RMS of pixels)",
}
_TONES = 5
_SETTLED = 0.25  # largest relative difference of L0, and difference of FVU in its tenths
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
    if scores.get("splice") and scores["splice"]["recovered"] is not None:
        known.append(f"{scores['splice']['recovered']:.1%} recovered when spliced")
    if not is_settled(scores):
        known.append(f"threshold not settled, L0 as trained {scores['l0_in_training']:.1f}")
    return ", ".join([*shown, *known])


def write_evaluation(title: str, site: str, scores: Mapping[str, Notes], path: Path) -> Path:
    """Writes the page of `dreamreader sae eval`.

    Args:
        scores: of the autoencoder and its controls by name.
    """
    blocks: list[object] = [_table(COLUMNS, scores)]
    blocks += [Text(each) for each in describe_unsettled(scores)]
    sections = [Section("Reconstruction", blocks), *measured_sections(site, scores)]
    return Report(title, f"Measured at {site}.", [], sections).write(path)


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
    columns = _present(COLUMNS, [each["scores"] for each in own.values()])
    agreement = notes["seed_mcc"]
    rows = []
    for name, each in own.items():
        scores = [_shown(each["scores"].get(column)) for column in columns]
        mcc = agreement.get(each["title"]) if not each["control"] else None
        shown = [*scores, *([_shown(mcc)] if agreement else [])]
        rows.append((name, *shown, Path(each["file"]).name))
    agreed = ["seed MCC"] if agreement else []
    heads = ("autoencoder", *(COLUMNS[c] for c in columns), *agreed, "file")
    table = Table(heads, rows, "Controls were trained as the others were.")
    scores = {name: each["scores"] for name, each in own.items()}
    blocks = [table, *(Text(each) for each in describe_unsettled(scores))]
    return [
        Section(site, blocks, _lead(spec)),
        *measured_sections(site, scores, notes.get("activations")),
        Section(f"{site}: training", [Charts([_losses(own), _frequencies(own), *_curves(own)])]),
    ]


def describe_unsettled(scores: Mapping[str, Notes]) -> list[str]:
    """Says which thresholds of inference keep other latents than training did."""
    lines, missing = [], [name for name, each in scores.items() if each.get("no_threshold")]
    for name, each in scores.items():
        if not is_settled(each):
            lines.append(
                f"{name}: L0 {each['l0']:.3g} and FVU {each['fvu']:.3g} at inference, "
                f"{each['l0_in_training']:.3g} and {each['fvu_in_training']:.3g} as trained"
            )
    found = []
    if lines:
        found.append(
            "Thresholds have not settled: they keep other latents than the selection of training "
            f"does. {'; '.join(lines)}. Train for more steps (the saelens rule needs some 500, "
            "that of dictionary_learning begins after 1000), or set inference to selection."
        )
    if missing:
        found.append(
            f"No threshold yet: {', '.join(missing)}. Codes depend on the batch until training has "
            "more steps than its threshold rule waits for, so these are not probed or spliced."
        )
    return found


def is_settled(scores: Notes) -> bool:
    """Whether inference keeps about what training did."""
    if "l0_in_training" not in scores:
        return True
    l0, fvu = scores["l0_in_training"], scores["fvu_in_training"]
    near = abs(scores["l0"] - l0) <= _SETTLED * l0
    return near and abs(scores["fvu"] - fvu) <= 0.1 * _SETTLED + 0.1 * fvu


def measured_sections(
    site: str, scores: Mapping[str, Notes], activations: Notes | None = None
) -> list[Section]:
    """Probes, absorption and splices of autoencoders by name, where they were measured."""
    sections = []
    probed = {name: _probed(each) for name, each in scores.items() if "probes" in each}
    if probed:
        lines = dict(probed)
        if activations:
            lines["the activations themselves"] = _probed(activations)
        blocks: list[object] = [
            _table(PROBED, lines, "Means over attributes, on samples that trained no probe."),
        ]
        blocks += [
            Folded(name, [_by_attribute(scores[name]["attributes"])]) for name in list(probed)[:6]
        ]
        lead = (
            "Logistic probes on the latents that differ most with an attribute, of means over "
            "each sample; absorbed: the latent of an attribute is silent, another one carries it."
        )
        sections.append(Section(f"{site}: attributes", blocks, lead))
    spliced = {name: each["splice"] for name, each in scores.items() if each.get("splice")}
    if spliced:
        first = next(iter(spliced.values()))
        lead = f"{_MEASURES[first['measure']].capitalize()}, mean of {first['prompts']} prompts."
        caption = (
            "Spliced: reconstructions stand in for the activations. With the error: what the "
            "autoencoder leaves out is added back, which gives the model as it is. Recovered: "
            "1 is the model as it is, 0 is zeros, or the mean of the site, in their place."
        )
        sections.append(Section(f"{site}: splice", [_table(SPLICED, spliced, caption)], lead))
    return sections


def _probed(scores: Notes) -> dict[str, float]:
    """Scores of probes by column."""
    found = {
        f"{name}_{k}": each[name]
        for k, each in scores["probes"].items()
        for name in ("auroc", "f1")
    }
    return found | {name: scores[name] for name in ("absorbed", "silent") if name in scores}


def _by_attribute(attributes: Mapping[str, Notes]) -> Table:
    columns = {"latent": "latent", "auroc": "AUROC", "absorbed": "absorbed", "silent": "silent"}
    return _table(columns, attributes, first="attribute")


def _table(
    columns: Mapping[str, str],
    lines: Mapping[str, Notes],
    caption: str = "",
    first: str = "autoencoder",
) -> Table:
    """A line for each, of the columns that any has."""
    there = _present(columns, lines.values())
    rows = [(name, *(_shown(each.get(c)) for c in there)) for name, each in lines.items()]
    return Table((first, *(columns[c] for c in there)), rows, caption)


def _present(columns: Iterable[str], lines: Iterable[Notes]) -> list[str]:
    listed = list(lines)
    return [c for c in columns if any(each.get(c) is not None for each in listed)]


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
