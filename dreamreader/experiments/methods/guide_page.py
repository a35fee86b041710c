"""What a guidance run found: how many rows reached their labels, and what else changed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader.experiments.methods.guide import UNIFORM
from dreamreader.experiments.page import curves
from dreamreader.experiments.results import Found, axis_values, said
from dreamreader.report import Number, Section, Table
from dreamreader.stats import Interval
from dreamreader.stats.variation import variation_to_uniform

if TYPE_CHECKING:
    from dreamreader.experiments.methods.guide import Guide
    from dreamreader.experiments.results import Results

SETTING = ("cell", "strength", "iterations")
_STILL = ("unedited", "target_prompt")
_MOVED = ("edited", "random_probe", "difference")


def summary(method: "Guide", results: "Results") -> list[str]:
    """Every condition at its best setting; the random probe at that of the probe."""
    lines = []
    for name, where, columns in _compared(method, results):
        few = [*list(columns)[:5], *(label for label in columns if label.startswith("variation"))]
        found = ", ".join(f"{label} {said(columns[label])}" for label in few)
        lines.append(f"  {name.replace('_', ' ')}{_setting(where)}: {found}")
    return lines


def numbers(method: "Guide", results: "Results") -> list[Number]:
    """The first column of the conditions that were moved."""
    found = []
    for name, _, columns in _compared(method, results):
        label, value = next(iter(columns.items()))
        if name in _MOVED:
            shown = f"{label}, {name}".replace("_", " ")
            found.append(
                Number(f"{value.value:.3g}", shown, f"{value.low:.2g} to {value.high:.2g}")
            )
    return found


def sections(method: "Guide", results: "Results") -> list[Section]:
    """The conditions side by side, curves over strength and inner steps, and the probes."""
    compared = _compared(method, results)
    names = list(compared[0][2])
    rows = [
        (name.replace("_", " "), _setting(where).strip(), *map(said, columns.values()))
        for name, where, columns in compared
    ]
    table = Table(("condition", "setting", *names), rows, "Means with 95 % intervals.")
    return [Section("Guidance", [table]), *_curves(method, results), *_probes(results)]


def best_of(method: "Guide", results: "Results", condition: str) -> dict[str, Any]:
    """The setting of a condition with the largest mean of the effect, the weaker one of equals."""
    column = _effect(method, results)
    found: dict[tuple[Any, ...], list[Found]] = {}
    for row in results.of(condition):
        found.setdefault(tuple(row.get(name) for name in SETTING), []).append(row)

    def rank(key: tuple[Any, ...]) -> tuple[float, float, float]:
        values = [np.nan if row[column] is None else float(row[column]) for row in found[key]]
        return float(np.nan_to_num(np.mean(values), nan=-np.inf)), -abs(key[1]), -(key[2] or 0)

    return dict(zip(SETTING, max(found, key=rank), strict=True))


def _effect(method: "Guide", results: "Results") -> str:
    return results.effect_column(method.effect, "edited", "unedited")


def _compared(
    method: "Guide", results: "Results"
) -> list[tuple[str, dict[str, Any], dict[str, Interval]]]:
    """(condition, setting, columns) of all conditions."""
    chosen = best_of(method, results, "edited")
    settings = {name: {} for name in _STILL} | {"edited": chosen, "random_probe": chosen}
    if results.of("difference"):
        settings["difference"] = best_of(method, results, "difference")
    names = _columns(method, results)
    return [
        (name, where, _measured(method, results.of(name, **where), names))
        for name, where in settings.items()
        if results.of(name)
    ]


def _columns(method: "Guide", results: "Results") -> list[str]:
    first = _effect(method, results)
    return [first, *(name for name in results.numbers if name != first)][:8]


def _measured(method: "Guide", rows: Sequence[Found], names: Sequence[str]) -> dict[str, Interval]:
    from dreamreader.experiments.results import interval

    found = {name: interval(row.get(name) for row in rows) for name in names}
    for attribute, label in method.target.items():
        if label == UNIFORM and rows and attribute in rows[0]:
            labels = _labels(method, attribute)
            seen = [str(row[attribute]) for row in rows]
            found[f"variation of {attribute}"] = variation_to_uniform(seen, labels)
    return found


def _labels(method: "Guide", attribute: str) -> list[str]:
    from dreamreader.experiments.methods.guide import column_of

    column = method.labels[attribute]
    return sorted(set(map(str, column_of(method.fit_items(), attribute, column))))


def _setting(where: Mapping[str, Any]) -> str:
    parts = []
    if where.get("cell") is not None:
        parts.append(str(where["cell"]))
    if where.get("strength") is not None:
        parts.append(f"strength {where['strength']:g}")
    if where.get("iterations") is not None:
        parts.append(f"{where['iterations']} inner steps")
    return f" ({', '.join(parts)})" if parts else ""


def _curves(method: "Guide", results: "Results") -> list[Section]:
    cell = best_of(method, results, "edited")["cell"]
    found = []
    if len(method.strengths) > 1:
        lines = {
            f"{inner} inner steps": results.of("edited", cell=cell, iterations=inner)
            for inner in axis_values(results.of("edited"), "iterations")
        }
        for name in ("random_probe", "difference"):
            if results.of(name, cell=cell):
                lines[name] = results.of(name, cell=cell)
        found.append(Section("Strength", [curves(results, "strength", lines)], f"At {cell}."))
    if len(method.iterations) > 1:
        lines = {
            f"strength {strength:g}": results.of("edited", cell=cell, strength=strength)
            for strength in method.strengths
        }
        found.append(Section("Inner steps", [curves(results, "iterations", lines)], f"At {cell}."))
    return found


def _probes(results: "Results") -> list[Section]:
    """The card of every probe."""
    from dreamreader.experiments.methods.guide_probes import probe_file
    from dreamreader.probes import Probe

    found: list[Section] = []
    while (file := probe_file(results.folder.path, len(found))).is_file():
        found.append(Probe.load(file).card.section())
    return found
