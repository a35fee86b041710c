"""What a steering run found: dose and response, where it worked, and what speaks for it."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader.experiments.page import axis_section, curves
from dreamreader.experiments.results import Found, said
from dreamreader.report import HeatMap, Number, Section, Table
from dreamreader.steering import Directions

if TYPE_CHECKING:
    from dreamreader.experiments.methods.steer import Steer
    from dreamreader.experiments.results import Results

SWEPT = ("edited", "random_direction", "shuffled_labels")


def sections(method: "Steer", results: "Results") -> list[Section]:
    """Curves at the best cell, heat maps over all, and the evidence of the directions."""
    column = results.effect_column(method.effect, "edited", "unedited")
    cell, _ = best(results, column)
    lines = {name: results.of(name, cell=cell) for name in SWEPT if results.of(name)}
    lead = f"At {cell}, the cell with the largest {column.replace('_', ' ')}."
    return [
        Section("Strength", [curves(results, "strength", lines)], lead),
        Section("Sites and windows", [_heat_map(results, column)]),
        *_pictures(results, cell),
        _evidence(method, results),
    ]


def numbers(method: "Steer", results: "Results") -> list[Number]:
    """The best setting, and what the same strength of each control does."""
    column = results.effect_column(method.effect, "edited", "unedited")
    cell, strength = best(results, column)
    found = []
    for name in SWEPT:
        if results.of(name):
            mean = results.mean(name, column, cell=cell, strength=strength)
            label = f"{column}, {name}".replace("_", " ")
            found.append(Number(f"{mean.value:.3g}", label, f"{mean.low:.2g} to {mean.high:.2g}"))
    return found


def summary(method: "Steer", results: "Results") -> list[str]:
    """The best setting beside its controls."""
    column = results.effect_column(method.effect, "edited", "unedited")
    cell, strength = best(results, column)
    lines = [f"  best by {column}: {cell}, strength {strength:g}"]
    for name in ("unedited", "target_prompt"):
        if results.of(name):
            lines.append(f"  {name.replace('_', ' '):<18} {said(results.mean(name, column))}")
    for name in SWEPT:
        if results.of(name):
            found = results.mean(name, column, cell=cell, strength=strength)
            lines.append(f"  {name.replace('_', ' '):<18} {said(found)}")
    return lines


def best(results: "Results", column: str) -> tuple[str, float]:
    """(cell, strength) with the largest mean of a column; the weaker edit where two are equal."""
    found: dict[tuple[str, float], list[Found]] = {}
    for row in results.of("edited"):
        found.setdefault((row["cell"], row["strength"]), []).append(row)
    means = {
        key: np.mean([np.nan if row[column] is None else float(row[column]) for row in rows])
        for key, rows in found.items()
    }
    return max(means, key=lambda key: (np.nan_to_num(means[key], nan=-np.inf), -abs(key[1])))


def _heat_map(results: "Results", column: str) -> HeatMap:
    rows = results.of("edited")
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    strengths = sorted({row["strength"] for row in rows})
    found = [
        [results.mean("edited", column, cell=cell, strength=s) for s in strengths] for cell in cells
    ]
    values = np.array([[each.value for each in line] for line in found])
    return HeatMap(
        f"{column.replace('_', ' ')} by cell and strength",
        values,
        cells,
        [f"{s:g}" for s in strengths],
        limit=max(1.0, float(np.nanmax(np.abs(values)))),
        percent=bool(np.nanmax(np.abs(values)) <= 1),
        notes=[[said(each) for each in line] for line in found],
    )


def _pictures(results: "Results", cell: str) -> list[Section]:
    only = results.where(cell=cell)
    section = axis_section(only, "strength", "edited", "The first prompts, strength by strength")
    pictures = [block for block in section.blocks if getattr(block, "kind", "") == "gallery"]
    return [Section(section.title, pictures)] if pictures else []


def _evidence(method: "Steer", results: "Results") -> Section:
    directions = Directions.load(method.directions_file(results.folder.path))
    rows = []
    for site, each in directions.evidence.items():
        numbers: list[Any] = [_span(v) for v in (each.auc, each.auc_shuffled, each.auc_random)]
        rows.append((site, f"{each.rows[0]} + {each.rows[1]}", *numbers, _span(each.split_half)))
    table = Table(
        ("site", "rows", "AUC held out", "AUC shuffled", "AUC random", "split-half cosine"),
        rows,
        "Lowest to highest over the steps. AUC: how often a target row that had no part in the fit "
        "lies further along the direction than a source row; 0.5 is chance.",
    )
    return Section("Directions", [table], f"{directions.method}, norm {directions.norm}.")


def _span(values: tuple[float, ...]) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "–"
    low, high = min(known), max(known)
    return f"{low:.2f}" if len(known) == 1 else f"{low:.2f} – {high:.2f}"
