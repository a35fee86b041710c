"""Labels as targets of a probe: classes of one or several attributes, flags, or numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName

TASKS = ("classify", "regress", "multilabel")


@dataclass(frozen=True)
class Task:
    """What a probe tells.

    Attributes:
        kind: `classify`, one class of each attribute; `multilabel`, each label or not; `regress`,
            numbers.
        classes: names of the outputs by attribute; the name of a single attribute, and of all
            numbers together, is "".
    """

    kind: str
    classes: Mapping[str, tuple[str, ...]]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of all outputs in their order: `red`, or `color=red` with several attributes."""
        return tuple(
            f"{attribute}={name}" if attribute else name
            for attribute, names in self.classes.items()
            for name in names
        )

    @property
    def parts(self) -> dict[str, slice]:
        """The outputs of each attribute."""
        found, start = {}, 0
        for attribute, names in self.classes.items():
            found[attribute] = slice(start, start + len(names))
            start += len(names)
        return found


Targets = Int[Tensor, "rows attributes"] | Float[Tensor, "rows outputs"]
"""Numbers of classes within their attribute, or flags or numbers of the outputs."""


def encode_labels(
    labels: Any, kind: str, classes: Any = None, rows: int | None = None
) -> tuple[Task, Targets]:
    """The task and the targets of labelled rows.

    Args:
        labels: classify: a name or number for each row, or a mapping from attributes to such;
            regress: a number for each row, or a mapping; multilabel: the set of names of each row,
            or flags [rows, labels].
        kind: of the task.
        classes: names of the classes in their order, by attribute where there are several; by
            default those that occur, sorted. Numbers of classes count in it.
        rows: how many labels are needed.

    Raises:
        UnknownName: of the task, or a label that is none of the classes.
        InvalidInput: another number of labels, a number out of range, or values that are no labels.
    """
    if kind not in TASKS:
        raise UnknownName("task of a probe", kind, TASKS)
    if kind == "multilabel":
        task, targets = _flags(labels, classes)
    else:
        given = labels if isinstance(labels, Mapping) else {"": labels}
        named = classes if isinstance(classes, Mapping) else dict.fromkeys(given, classes)
        if missing := [each for each in given if each not in named]:
            raise UnknownName("attribute of classes", missing[0], named)
        each = _numbers if kind == "regress" else _classes
        found = {name: each(name, value, named[name]) for name, value in given.items()}
        if len({len(values) for _, values in found.values()}) > 1:
            sizes = ", ".join(f"{name} {len(values)}" for name, (_, values) in found.items())
            raise InvalidInput(f"labels: the attributes have different numbers of rows ({sizes})")
        by_attribute = {name: names for name, (names, _) in found.items()}
        if kind == "regress":
            by_attribute = {"": tuple(name for names in by_attribute.values() for name in names)}
        task = Task(kind, by_attribute)
        targets = torch.stack([values for _, values in found.values()], 1)
    if rows is not None and len(targets) != rows:
        raise InvalidInput(f"labels: {len(targets)} for {rows} rows")
    return task, targets


def _classes(attribute: str, labels: Any, classes: Any) -> tuple[tuple[str, ...], Tensor]:
    what = f"labels of {attribute!r}" if attribute else "labels"
    listed = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if any(isinstance(each, float) or not isinstance(each, int | str) for each in listed):
        kind = next(type(e).__name__ for e in listed if not isinstance(e, int | str))
        raise InvalidInput(f"{what}: names or numbers of classes are needed, got {kind}")
    if any(isinstance(each, str) for each in listed):
        known = tuple(sorted({str(each) for each in listed})) if classes is None else tuple(classes)
        order = {name: n for n, name in enumerate(known)}
        if unknown := [each for each in listed if each not in order]:
            raise UnknownName(
                "class" + (f" of {attribute}" if attribute else ""), unknown[0], known
            )
        numbers = [order[each] for each in listed]
    else:
        numbers = [int(each) for each in listed]
        count = len(classes) if classes is not None else max(numbers, default=0) + 1
        known = tuple(map(str, range(count))) if classes is None else tuple(classes)
        if wrong := [each for each in numbers if not 0 <= each < count]:
            raise InvalidInput(f"{what}: {wrong[0]} is out of range, there are {count} classes")
    if len(known) < 2 or len(set(known)) < len(known):
        raise InvalidInput(
            f"{what}: a classifier needs two different classes or more, got {list(known)}"
        )
    return known, torch.tensor(numbers, dtype=torch.int64)


def _numbers(attribute: str, labels: Any, classes: Any) -> tuple[tuple[str, ...], Tensor]:
    what = f"labels of {attribute!r}" if attribute else "labels"
    values = torch.as_tensor(labels).float()
    if values.dim() != 1 or not bool(values.isfinite().all()):
        raise InvalidInput(f"{what}: one finite number for each row is needed")
    if classes is not None:
        raise InvalidInput("classes belong to the tasks classify and multilabel")
    return (attribute or "value",), values


def _flags(labels: Any, classes: Sequence[str] | None) -> tuple[Task, Tensor]:
    if isinstance(labels, Tensor):
        if labels.dim() != 2 or not bool(((labels == 0) | (labels == 1)).all()):
            raise InvalidInput(
                f"labels: flags 0 and 1 [rows, labels] are needed, got {list(labels.shape)}"
            )
        known = tuple(map(str, range(labels.shape[1]))) if classes is None else tuple(classes)
        if len(known) != labels.shape[1]:
            raise InvalidInput(f"labels: flags of {labels.shape[1]} labels, {len(known)} are named")
        return Task("multilabel", {"": known}), labels.float()
    sets = [{each} if isinstance(each, str) else set(each) for each in labels]
    known = tuple(sorted(set().union(*sets))) if classes is None else tuple(classes)
    if unknown := sorted(set().union(*sets) - set(known)):
        raise UnknownName("label", unknown[0], known)
    flags = torch.tensor([[name in each for name in known] for each in sets])
    return Task("multilabel", {"": known}), flags.float().reshape(len(sets), len(known))
