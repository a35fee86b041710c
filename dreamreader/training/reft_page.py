"""The report of trained adapters: losses, and what they reach on held-out prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.jobs.page import job_report
from dreamreader.report import Charts, Curves, Number, Section, Series, Table
from dreamreader.training.folder import HISTORY, RESULT, TrainingFolder
from dreamreader.training.page import thin_curve
from dreamreader.training.specs import ReftSpec


def write_report(spec: ReftSpec, folder: TrainingFolder) -> Path:
    """Writes `report.html` into a complete folder."""
    folder.check()
    result, taken = folder.need(RESULT), folder.need(FINGERPRINT)
    lines = [json.loads(line) for line in (folder.path / HISTORY).read_text().splitlines()]
    training = spec.training
    page = job_report(
        folder.path,
        taken,
        spec.name,
        f"{training.variant} adapters of {spec.subject.model}, trained on {training.loss}.",
        _numbers(result),
        [
            Section("Losses", [Charts([_curves(lines)])], _lead(result)),
            _sites(result),
            *_terms(result),
        ],
    )
    with explain_disk_errors(folder.path):
        return page.write(folder.path / "report.html")


def parameters(result: Mapping[str, Any]) -> int:
    return sum(each["parameters"] for each in result["sites"].values())


def explained_share(result: Mapping[str, Any]) -> float | None:
    """Mean over terms of the share of the held-out loss that was taken away."""
    found = list(result["explained"].values())
    return sum(found) / len(found) if found else None


def _numbers(result: Mapping[str, Any]) -> list[Number]:
    count, share = parameters(result), explained_share(result)
    of = result["model_parameters"]
    held = f"{result['prompts']['held_out']:,} prompts that trained nothing"
    note = f"{100 * count / of:.3g} % of the model's" if of else ""
    found = [Number(f"{count:,}", "parameters trained", note)]
    if share is not None:
        found.insert(0, Number(f"{100 * share:.1f} %", "of the difference explained", held))
    return [*found, Number(f"{result['best']:,}", "steps", f"the best of {result['steps']:,}")]


def _lead(result: Mapping[str, Any]) -> str:
    kept = f"The adapters are those of step {result['best']:,}"
    return kept + (", and training stopped early." if result["stopped"] else ".")


def _curves(lines: Sequence[Mapping[str, Any]]) -> Curves:
    series = [Series("training", *thin_curve([each["loss"] for each in lines]), tone=1)]
    validated = [each for each in lines if each["validation"] is not None]
    if validated:
        x, y = ([float(each[name]) for each in validated] for name in ("step", "validation"))
        series.append(Series("held out", x, y, tone=2))
    top = max(value for line in series for value in line.y)
    return Curves("loss", series, "step", y_range=(0.0, top or 1.0), percent=False)


def _sites(result: Mapping[str, Any]) -> Section:
    rows = [
        (
            site,
            each["width"],
            each["rank"],
            f"{each['parameters']:,}",
            "–" if each["orthonormality"] is None else f"{each['orthonormality']:.1e}",
            _share(result["explained"].get(site)),
        )
        for site, each in result["sites"].items()
    ]
    columns = ("site", "width", "rank", "parameters", "largest entry of RR' - I", "explained")
    lead = "Explained: the share of the difference between held-out prompts that the edit makes."
    return Section("Sites", [Table(columns, rows)], lead)


def _terms(result: Mapping[str, Any]) -> list[Section]:
    """Losses on held-out prompts without and with the adapters."""
    rows = [
        (name, f"{before:.4g}", f"{after:.4g}", _share(result["explained"].get(name)))
        for name, (before, after) in result["held_out"].items()
    ]
    if not rows:
        return []
    columns = ("loss", "without adapters", "with adapters", "taken away")
    return [Section("Held-out prompts", [Table(columns, rows)])]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
