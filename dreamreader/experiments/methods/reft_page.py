"""What learned edits did: beside their controls, over strength, rank and sites."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamreader.experiments.page import curves
from dreamreader.experiments.results import Found, said
from dreamreader.report import Number, Section, Table

if TYPE_CHECKING:
    from dreamreader.experiments.methods.reft import Reft
    from dreamreader.experiments.results import Results

SETTING = ("variant", "rank", "cell", "strength")
MOVED = ("edited", "untrained", "difference")


def summary(method: "Reft", results: "Results") -> list[str]:
    """Every condition, variant by variant, each at its best setting."""
    names = _columns(method, results)[:5]
    lines = []
    for label, where in _compared(method, results):
        means = {name: results.mean(where["condition"], name, **_only(where)) for name in names}
        found = ", ".join(f"{name} {said(value)}" for name, value in means.items())
        lines.append(f"  {label}{_setting(where)}: {found}")
    return lines


def numbers(method: "Reft", results: "Results") -> list[Number]:
    """The effect of each condition at its best setting."""
    column = _effect(method, results)
    found = []
    for label, where in _compared(method, results):
        if where["condition"] in MOVED:
            mean = results.mean(where["condition"], column, **_only(where))
            text = f"{column.replace('_', ' ')}, {label}"
            found.append(Number(f"{mean.value:.3g}", text, f"{mean.low:.2g} to {mean.high:.2g}"))
    return found


def sections(method: "Reft", results: "Results") -> list[Section]:
    names = _columns(method, results)
    rows = []
    for label, where in _compared(method, results):
        means = (results.mean(where["condition"], name, **_only(where)) for name in names)
        rows.append((label, _setting(where).strip(" ()"), *map(said, means)))
    table = Table(("condition", "setting", *names), rows, "Means with 95 % intervals.")
    return [
        Section("Learned edits", [table], "Every condition at its best setting."),
        *_curves(method, results),
        *_every(results, names),
        *_training(results),
    ]


def best(
    method: "Reft", results: "Results", condition: str = "edited", **where: Any
) -> dict[str, Any]:
    """The setting with the largest mean of the effect; the weaker one of equals."""
    column = _effect(method, results)
    found: dict[tuple[Any, ...], list[Found]] = {}
    for row in results.of(condition, **where):
        found.setdefault(tuple(row.get(name) for name in SETTING), []).append(row)

    def rank(key: tuple[Any, ...]) -> tuple[float, float, float]:
        values = [np.nan if row[column] is None else float(row[column]) for row in found[key]]
        return float(np.nan_to_num(np.mean(values), nan=-np.inf)), -abs(key[3]), -(key[1] or 0)

    return dict(zip(SETTING, max(found, key=rank), strict=True))


def _effect(method: "Reft", results: "Results") -> str:
    return results.effect_column(method.effect, "edited", "unedited")


def _columns(method: "Reft", results: "Results") -> list[str]:
    first = _effect(method, results)
    return [first, *(name for name in results.numbers if name != first)][:8]


def _compared(method: "Reft", results: "Results") -> list[tuple[str, dict[str, Any]]]:
    """(label, condition and setting) of what stands side by side."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in ("unedited", "target_prompt"):
        if results.of(name):
            found.append((name.replace("_", " "), {"condition": name}))
    for variant in method.variants:
        found.append((variant, {"condition": "edited"} | best(method, results, variant=variant)))
    if results.of("untrained"):  # at the place and strength of the trained ones
        at = {name: best(method, results)[name] for name in ("cell", "strength")}
        same = best(method, results, "untrained", **at)
        found.append(("untrained", {"condition": "untrained"} | same))
    if results.of("difference"):
        chosen = best(method, results, "difference")
        found.append(("difference of means", {"condition": "difference"} | chosen))
    return found


def _only(where: Mapping[str, Any]) -> dict[str, Any]:
    return {name: where[name] for name in SETTING if where.get(name) is not None}


def _setting(where: Mapping[str, Any]) -> str:
    parts = []
    if where.get("rank"):
        parts.append(f"rank {where['rank']}")
    if where.get("cell") is not None:
        parts += [str(where["cell"]), f"strength {where['strength']:g}"]
    return f" ({', '.join(parts)})" if parts else ""


def _curves(method: "Reft", results: "Results") -> list[Section]:
    """Over strength and over rank, all else as in the best setting."""
    at = best(method, results)
    found = []
    if len(method.strengths) > 1:
        same = {name: at[name] for name in ("variant", "rank", "cell")}
        lines = {at["variant"]: results.of("edited", **same)}
        for name in MOVED[1:]:
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


def _every(results: "Results", names: list[str]) -> list[Section]:
    """All settings in a table: the number of sites shows in the cells."""
    keys = dict.fromkeys(
        (row["condition"], *(row.get(name) for name in SETTING))
        for row in results.rows
        if row["condition"] in MOVED
    )
    rows = []
    for condition, *values in keys:
        where = {n: value for n, value in zip(SETTING, values, strict=True) if value is not None}
        means = [said(results.mean(condition, name, **where)) for name in names]
        shown = ["" if value is None else value for value in values]
        rows.append((condition, *shown, *means))
    return [Section("Every setting", [Table(("condition", *SETTING, *names), rows)])]


def _training(results: "Results") -> list[Section]:
    from dreamreader.experiments.methods.reft_adapters import evidence_file

    file = evidence_file(results.folder.path)
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text().splitlines():
        one = json.loads(line)
        held = [f"{value:.4g}" for _, value in one["validation"]] or ["–"]
        rows.append(
            (one["cell"], one["variant"], one["rank"] or "", f"{one['parameters']:,}", one["steps"])
            + (held[0], min(held, key=float) if one["validation"] else "–")
        )
    columns = ("cell", "variant", "rank", "parameters", "steps", "first held-out loss", "best")
    return [Section("Training", [Table(columns, rows)], "Losses on held-out pairs.")]
