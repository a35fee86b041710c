"""What a guidance run found: how many rows reached their labels, and what else changed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreamreader.experiments.methods import compared
from dreamreader.experiments.methods.compared import STILL, Line, columns_of
from dreamreader.experiments.methods.guide import UNIFORM
from dreamreader.experiments.page import curves
from dreamreader.experiments.results import Found, axis_values, interval
from dreamreader.report import Number, Section
from dreamreader.stats import Interval
from dreamreader.stats.variation import variation_to_uniform

if TYPE_CHECKING:
    from dreamreader.experiments.methods.guide import Guide
    from dreamreader.experiments.results import Results

SETTING = ("cell", "strength", "iterations")


def summary(method: "Guide", results: "Results") -> list[str]:
    """Every condition at its best setting; the random probe at that of the probe."""
    return compared.summary(_lines(method, results))


def numbers(method: "Guide", results: "Results") -> list[Number]:
    """The effect in the conditions that were moved."""
    return compared.numbers(_lines(method, results))


def sections(method: "Guide", results: "Results") -> list[Section]:
    """The conditions side by side, curves over strength and inner steps, and the probes."""
    table = compared.table(_lines(method, results))
    return [Section("Guidance", [table]), *_curves(method, results), *_probes(results)]


def best(method: "Guide", results: "Results", condition: str = "edited") -> dict[str, Any]:
    """The setting of a condition with the largest mean of the effect, the weaker one of equals."""
    return compared.best(method, results, SETTING, condition)


def _lines(method: "Guide", results: "Results") -> list[Line]:
    """What stands side by side."""
    chosen, names = best(method, results), columns_of(method, results)
    settings = {name: {} for name in STILL} | {"edited": chosen, "random_probe": chosen}
    if results.of("difference"):
        settings["difference"] = best(method, results, "difference")
    return [
        Line(name.replace("_", " "), name, where, _measured(method, rows, names))
        for name, where in settings.items()
        if (rows := results.of(name, **where))
    ]


def _measured(method: "Guide", rows: Sequence[Found], names: Sequence[str]) -> dict[str, Interval]:
    found = {name: interval(row.get(name) for row in rows) for name in names}
    for attribute, label in method.target.items():
        if label == UNIFORM and rows and attribute in rows[0]:
            labels = method.labels_of(method.fit_items(), attribute)
            seen = [str(row[attribute]) for row in rows]
            found[f"variation of {attribute}"] = variation_to_uniform(seen, labels)
    return found


def _curves(method: "Guide", results: "Results") -> list[Section]:
    """At the best cell; the random probe with the inner steps of the best setting."""
    at = best(method, results)
    cell, found = at["cell"], []
    if len(method.strengths) > 1:
        lines = {
            f"{inner} inner steps": results.of("edited", cell=cell, iterations=inner)
            for inner in axis_values(results.of("edited"), "iterations")
        }
        controls = {"random_probe": {"iterations": at["iterations"]}, "difference": {}}
        for name, where in controls.items():
            if rows := results.of(name, cell=cell, **where):
                lines[name] = rows
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
