"""The labels of a probe's rows: columns of the data, or what the detector reads from pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName

Named = str | list[str] | dict[str, str | list[str]]
"""A column; several; {attribute: column}; or {detector: attribute, or several}."""

Values = dict[str, list[Any]]
"""Labels of rows by attribute; the name of a single one is ""."""

DETECTOR = "detector"


def columns_of(named: Named) -> dict[str, str]:
    """The columns that are read, by attribute; of the detector its attributes."""
    if isinstance(named, Mapping) and DETECTOR not in named:
        return {attribute: str(column) for attribute, column in named.items()}
    chosen = named[DETECTOR] if isinstance(named, Mapping) else named
    listed = [chosen] if isinstance(chosen, str) else list(chosen)
    return {"": listed[0]} if len(listed) == 1 else {name: name for name in listed}


def from_detector(named: Named) -> bool:
    return isinstance(named, Mapping) and DETECTOR in named


def check_detected(named: Named) -> None:
    """Refuse attributes that the detector does not read.

    Raises:
        UnknownName: it has no such attribute.
    """
    from dreamreader.metrics.detector import VALUES

    for name in columns_of(named).values():
        if name not in (*VALUES, "frame"):
            raise UnknownName("attribute of the detector", name, (*VALUES, "frame"))


def detect_labels(named: Named, images: Any) -> Values:
    """What the detector reads from pictures [rows, 3, 64, 64]; None without an object."""
    from dreamreader.metrics.detector import attributes
    from dreamreader.zoo.detector import detect

    found = [attributes(reading) for reading in detect(images)]
    return {
        name: [each[attribute] for each in found] for name, attribute in columns_of(named).items()
    }


def of_columns(named: Named, rows: Sequence[Mapping[str, Any]]) -> Values:
    """Labels from the columns of rows.

    Raises:
        UnknownName: no row has such a column.
    """
    known = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns_of(named).values():
        if column not in known:
            raise UnknownName("column of labels", column, known)
    return {name: [row.get(column) for row in rows] for name, column in columns_of(named).items()}


def complete_rows(values: Values, task: str) -> tuple[list[int], Any]:
    """Rows that have all labels, and these as `probes.fit` takes them.

    Raises:
        InvalidInput: no row has them, or a value is no number where numbers are needed.
    """
    count = len(next(iter(values.values())))
    rows = [n for n in range(count) if all(each[n] is not None for each in values.values())]
    if not rows:
        raise InvalidInput("labels: no row has one")
    read = {"regress": _number, "multilabel": _set}.get(task, _name)
    kept = {name: [read(each[n]) for n in rows] for name, each in values.items()}
    if task == "multilabel" and len(kept) > 1:
        raise InvalidInput(f"labels: multilabel has one column of lists, got {', '.join(kept)}")
    return rows, next(iter(kept.values())) if len(kept) == 1 else kept


def _name(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"labels: a regression needs numbers, got {value!r}") from None


def _set(value: Any) -> set[str]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        raise InvalidInput(f"labels: multilabel needs lists of names, got {value!r}")
    return {_name(each) for each in listed}
