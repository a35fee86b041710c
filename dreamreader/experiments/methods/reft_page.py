"""What learned edits did: beside their controls, over strength, rank and sites."""

from typing import TYPE_CHECKING, Any

from dreamreader.experiments.methods import compared
from dreamreader.experiments.methods.compared import STILL, Line, columns_of
from dreamreader.experiments.page import curves
from dreamreader.experiments.results import said
from dreamreader.report import Number, Section, Table

if TYPE_CHECKING:
    from dreamreader.experiments.methods.reft import Reft
    from dreamreader.experiments.results import Results

SETTING = ("variant", "rank", "cell", "strength")
CONTROLS = ("untrained", "difference")


def summary(method: "Reft", results: "Results") -> list[str]:
    """Every condition, variant by variant, each at its best setting."""
    return compared.summary(_lines(method, results))


def numbers(method: "Reft", results: "Results") -> list[Number]:
    """The effect of each condition at its best setting."""
    return compared.numbers(_lines(method, results))


def sections(method: "Reft", results: "Results") -> list[Section]:
    table = compared.table(_lines(method, results))
    return [
        Section("Learned edits", [table], "Every condition at its best setting."),
        *_curves(method, results),
        _every(results, columns_of(method, results)),
        *_training(results),
    ]


def best(
    method: "Reft", results: "Results", condition: str = "edited", **where: Any
) -> dict[str, Any]:
    """The setting with the largest mean of the effect; the weaker one of equals."""
    return compared.best(method, results, SETTING, condition, **where)


def _lines(method: "Reft", results: "Results") -> list[Line]:
    """What stands side by side."""
    names = columns_of(method, results)
    found: list[Line] = []

    def add(label: str, condition: str, setting: dict[str, Any]) -> None:
        where = {name: value for name, value in setting.items() if value is not None}
        columns = {name: results.mean(condition, name, **where) for name in names}
        found.append(Line(label, condition, setting, columns))

    for name in STILL:
        if results.of(name):
            add(name.replace("_", " "), name, {})
    for variant in dict.fromkeys(method.variants):
        add(variant, "edited", best(method, results, variant=variant))
    if results.of("untrained"):  # at the place and strength of the trained ones
        chosen = best(method, results)
        same = {name: chosen[name] for name in ("cell", "strength")}
        add("untrained", "untrained", best(method, results, "untrained", **same))
    if results.of("difference"):
        add("difference of means", "difference", best(method, results, "difference"))
    return found


def _curves(method: "Reft", results: "Results") -> list[Section]:
    """Over strength and over rank, all else as in the best setting."""
    at = best(method, results)
    found = []
    if len(method.strengths) > 1:
        same = {name: at[name] for name in ("variant", "rank", "cell")}
        lines = {at["variant"]: results.of("edited", **same)}
        for name in CONTROLS:
            if results.of(name, cell=at["cell"]):
                lines[name] = results.of(name, cell=at["cell"])
        found.append(Section("Strength", [curves(results, "strength", lines)], f"At {at['cell']}."))
    if len(method.ranks) > 1:
        lines = {
            variant: results.of("edited", variant=variant, cell=at["cell"], strength=at["strength"])
            for variant in method.variants
        }
        found.append(Section("Rank", [curves(results, "rank", lines)], f"At {at['cell']}."))
    return found


def _every(results: "Results", names: list[str]) -> Section:
    """All settings in a table: the number of sites shows in the cells."""
    keys = dict.fromkeys(
        (row["condition"], *(row.get(name) for name in SETTING))
        for row in results.rows
        if row["condition"] not in STILL
    )
    rows = []
    for condition, *values in keys:
        where = {n: value for n, value in zip(SETTING, values, strict=True) if value is not None}
        means = [said(results.mean(condition, name, **where)) for name in names]
        shown = ["" if value is None else value for value in values]
        rows.append((condition, *shown, *means))
    return Section("Every setting", [Table(("condition", *SETTING, *names), rows)])


def _training(results: "Results") -> list[Section]:
    from dreamreader.experiments.methods.reft_adapters import evidence_name

    rows: list[tuple[Any, ...]] = []
    while (one := results.folder.read(evidence_name(len(rows)))) is not None:
        held = [value for _, value in one["validation"]]
        losses = (f"{held[0]:.4g}", f"{min(held):.4g}") if held else ("–", "–")
        kind = (one["cell"], one["variant"], one["rank"] or "")
        rows.append((*kind, f"{one['parameters']:,}", one["steps"], *losses))
    columns = ("cell", "variant", "rank", "parameters", "steps", "first held-out loss", "best")
    return [Section("Training", [Table(columns, rows)], "Losses on held-out pairs.")]
