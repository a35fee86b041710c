"""Labels of a probe to reach and to avoid, row by row, and what they make of its logits."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName

Set = tuple[str | int, ...]


def label_sets(given: Any) -> list[Set]:
    """The labels of every row; one entry where all rows have the same.

    Args:
        given: a label or a set of labels for all rows; or a list or tuple with one entry for each
            row: a label, a collection of labels, or None.

    Example:
        >>> label_sets("red"), label_sets(["red", None, {"blue"}])
        ([('red',)], [('red',), (), ('blue',)])
    """
    rows = given if isinstance(given, list | tuple) else [given]
    return [_labels(each) for each in rows] or [()]


def coefficients(
    targets: Sequence[Set], avoids: Sequence[Set], labels: Sequence[str], count: int
) -> Float[Tensor, "rows labels"]:
    """c of each row, for which guidance lowers sum_k c_k z_k.

    Formula: c_k = 1 / |avoid| for the labels to avoid, -1 / |target| for those to reach, else 0.

    Args:
        targets, avoids: labels of each row, names or indices.
        labels: names of the logits, none if they have none.
        count: number of logits.

    Raises:
        UnknownName: a name that is none of `labels`.
        InvalidInput: an index out of range, a name where there are none, or a label that is both.
    """
    c = torch.zeros(len(targets), count)
    for row, (target, avoid) in enumerate(zip(targets, avoids, strict=True)):
        reach, leave = ({_index(each, labels, count) for each in side} for side in (target, avoid))
        if reach & leave:
            both = min(reach & leave)
            name = repr(labels[both]) if labels else str(both)
            raise InvalidInput(f"ProbeGuidance: label {name} is both to reach and to avoid")
        c[row, sorted(reach)] = -1 / max(1, len(reach))
        c[row, sorted(leave)] = 1 / max(1, len(leave))
    return c


def _labels(given: Any) -> Set:
    if given is None:
        return ()
    if isinstance(given, str | int):
        return (given,)
    if isinstance(given, list | tuple):
        return tuple(given)
    if isinstance(given, set | frozenset):
        return tuple(sorted(given, key=str))
    raise InvalidInput(f"ProbeGuidance: a label is a name or an index, got {given!r}")


def _index(label: Any, labels: Sequence[str], count: int) -> int:
    if isinstance(label, str):
        if not labels:
            raise InvalidInput(
                f"ProbeGuidance: label {label!r} is a name, the probe knows its {count} labels by "
                "index alone"
            )
        if label not in labels:
            raise UnknownName("label of a probe", label, labels, f"It has {', '.join(labels)}")
        return labels.index(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < count:
        names = f" ({', '.join(labels)})" if labels else ""
        raise InvalidInput(
            f"ProbeGuidance: label {label!r} is out of range, the probe has {count}{names}"
        )
    return label
