"""The report of a matrix of maps: heat maps over sites, the best of each, what predicts success."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamreader._files import explain_disk_errors
from dreamreader.jobs.folder import FINGERPRINT
from dreamreader.jobs.page import job_report
from dreamreader.report import HeatMap, Number, Section, Table
from dreamreader.training.folder import RESULT, TrainingFolder
from dreamreader.training.map_matrix_spec import MapMatrixSpec

_MAPS = {
    "explained": ("Explained by the map", "Held-out 1 - FVU in %, 0 is the mean of the target."),
    "cka_source": ("Linear CKA", "Of source and target before any map, in %."),
    "retrieval": ("Retrieval", "Mapped rows that are nearest to their own of the sample, in %."),
    "cosine": ("Cosine", "Of mapped and target rows, neither less its mean, in %."),
    "success": ("Success of stitching", "As it was measured, in %."),
}
_NAMES = {"explained": "1 - FVU", "cka_source": "linear CKA"}


def write_report(spec: MapMatrixSpec, folder: TrainingFolder) -> Path:
    """Writes `report.html` into a complete folder."""
    result, taken = folder.need(RESULT), folder.need(FINGERPRINT)
    page = job_report(
        folder.path,
        taken,
        spec.name,
        f"Maps ({spec.map}) from {spec.subject.model} to {spec.target.model}, on held-out prompts.",
        _numbers(result),
        [*_heat_maps(result), _best(result), *_prediction(result), *_refusals(result)],
    )
    with explain_disk_errors(folder.path):
        return page.write(folder.path / "report.html")


def best_pairs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each target site the pair with the least held-out FVU."""
    found: dict[str, dict[str, Any]] = {}
    for pair in result["pairs"]:
        had = found.get(pair["target"])
        if had is None or pair["fvu"] < had["fvu"]:
            found[pair["target"]] = pair
    return list(found.values())


def _numbers(result: Mapping[str, Any]) -> list[Number]:
    best = min(result["pairs"], key=lambda pair: pair["fvu"])
    sites = result["sites"]
    note = f"{best['source']} to {best['target']}"
    return [
        Number(f"{100 * (1 - best['fvu']):.0f} %", "explained at best", note),
        Number(f"{len(result['pairs']):,}", "maps", f"{len(sites[0])} x {len(sites[1])} sites"),
        Number(f"{sum(result['prompts'].values()):,}", "prompts", "each recorded once"),
    ]


def _heat_maps(result: Mapping[str, Any]) -> list[Section]:
    sources, targets = result["sites"]
    sections = []
    for name, (title, lead) in _MAPS.items():
        values = np.full((len(sources), len(targets)), np.nan)
        for pair in result["pairs"]:
            value = 1 - pair["fvu"] if name == "explained" else pair[name]
            if value is not None:
                place = sources.index(pair["source"]), targets.index(pair["target"])
                values[place] = value
        if np.isnan(values).all():
            continue
        chart = HeatMap(title, values, sources, targets, corner="source \\ target")
        sections.append(Section(title, [chart], lead))
    return sections


def _best(result: Mapping[str, Any]) -> Section:
    rows: list[Sequence[object]] = [
        [
            pair["target"], pair["source"],
            *(f"{pair[name]:.3f}" for name in ("fvu", "fvu_scalar", "r2", "cosine", "cka_source")),
            f"{pair['retrieval']:.3f}", f"{pair['random']['median']:.2f}", f"{pair['p']:.4f}",
        ]
        for pair in best_pairs(result)
    ]  # fmt: skip
    head = ["target", "source", "FVU", "FVU scalar", "R2", "cosine", "CKA", "top-1"]
    return Section("Best source of each target site", [Table([*head, "random FVU", "p"], rows)])


def _prediction(result: Mapping[str, Any]) -> list[Section]:
    found = result["predicts"]
    if not found:
        return []
    rows = [
        [_NAMES.get(name, name), f"{value:.2f}", f"{low:.2f} to {high:.2f}", count]
        for name, (value, low, high, count) in found.items()
    ]
    return [
        Section(
            "What predicts stitching",
            [Table(["score", "rank correlation", "95 % interval", "pairs"], rows)],
            "Spearman's correlation, over pairs of sites, of what is measured before with the "
            "success of stitching. Pairs that share a site are not independent, so intervals are "
            "too narrow rather than too wide.",
        )
    ]


def _refusals(result: Mapping[str, Any]) -> list[Section]:
    if not result["refused"]:
        return []
    return [
        Section("Sites that do not pair", [Table(["source", "target", "why"], result["refused"])])
    ]
