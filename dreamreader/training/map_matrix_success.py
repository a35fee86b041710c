"""How well stitching went at pairs of sites: of a table, or of a stitching experiment."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.specs.files import FileRows

Success = dict[tuple[str, str], float]


def read_success(
    path: Path, sites: tuple[Sequence[str], Sequence[str]], effect: str, method: str, harmed: float
) -> Success:
    """The success of stitching by pair of sites.

    Args:
        path: a table with the columns source, target and success; or rows.parquet of a stitching
            experiment, of which success is the mean of `effect`, as a share of the unedited rows',
            with the map that was fitted to the most prompts.
        sites: of both models. method: of the map that was stitched, of an experiment.
        harmed: pairs of an experiment at sites whose ablation keeps more than this share are left
            out, as any map does well there.

    Raises:
        InvalidInput: a row lacks a column, or its success is no number; an experiment has no pair.
        UnknownName: a row names another site.
    """
    rows = list(FileRows(path))
    if rows and "cell" in rows[0][0]:
        return _of_experiment(path, [row for row, _ in rows], sites, effect, method, harmed)
    found = {}
    for row, where in rows:
        pair = _pair([row.get("source"), row.get("target")], where, sites)
        found[pair] = _number(row, "success", where)
    return found


def _of_experiment(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    sites: tuple[Sequence[str], Sequence[str]],
    effect: str,
    method: str,
    harmed: float,
) -> Success:
    if effect not in rows[0]:
        raise UnknownName(f"{path}: effect", effect, rows[0])
    values: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    own = {"condition": "stitched", "map": method, "strength": 1}
    chosen = [row for row in rows if all(row[key] == each for key, each in own.items())]
    most = max((_fit_prompts(row) for row in chosen), default=0)
    others = [row for row in rows if row["condition"] != "stitched"]
    for row in [*others, *chosen]:
        if row["condition"] != "stitched" or _fit_prompts(row) == most:
            values[row["condition"], row["cell"]].append(_number(row, effect, str(path)))
    native = fmean(values["unedited", None] or [0])
    if not native:
        raise InvalidInput(
            f"{path}: the unedited rows have no {effect}, so nothing is a share of it"
        )
    found = {}
    for (condition, cell), own in values.items():
        if condition != "stitched" or cell is None:
            continue
        ablated = values.get(("mean_ablated", cell))
        if ablated is None:
            raise InvalidInput(f"{path}: {cell} has no rows of mean_ablated beside it")
        if fmean(ablated) <= harmed * native:
            names = cell.split(" > ")
            found[_pair([names[0], names[-1]], str(path), sites)] = fmean(own) / native
    if not found:
        raise InvalidInput(
            f"{path}: it has no pair of sites where {method} was stitched and mean ablation keeps "
            f"{harmed:.0%} of {effect} at most"
        )
    return found


def _fit_prompts(row: Mapping[str, Any]) -> int:
    """To how many prompts the map of a row was fitted; 0 where the row does not say."""
    return row.get("fit_prompts") or 0


def _pair(
    names: Sequence[Any], where: str, sites: tuple[Sequence[str], Sequence[str]]
) -> tuple[str, str]:
    for side, name, known in zip(("source", "target"), names, sites, strict=True):
        if name not in known:
            raise UnknownName(f"{where}: {side} site", str(name), known)
    return str(names[0]), str(names[1])


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        raise InvalidInput(f"{where}: {name} must be a number, got {row.get(name)!r}") from None
    if not math.isfinite(value):
        raise InvalidInput(f"{where}: {name} must be finite, got {value}")
    return value
