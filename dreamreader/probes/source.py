"""Labelled rows that come in batches, several times over, and what one pass tells of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops import moments
from dreamreader.probes.labels import Targets, Task, encode_labels
from dreamreader.probes.objective import count_rows

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


@dataclass(frozen=True)
class LabelledPart:
    """Rows of one batch that go to one MLP."""

    x: Float[Tensor, "rows features"]
    targets: Targets
    fraction: Float[Tensor, " rows"]
    slot: int


@dataclass
class LabelledSource:
    """Batches as parts.

    Args:
        batches: tuples (x, labels[, fraction[, step]]) in an iterable that can be read again, or a
            function that gives one for an epoch.
        name: what errors call it.
        task: kind of the task; classes: its names.
        per_step: `each`, `shared` or `noise`.
        slots: number of the MLP of each step; grows in the first pass over the rows to
            train on.
    """

    batches: Batches
    name: str
    task: str
    classes: Any
    per_step: str
    slots: dict[int, int] = field(default_factory=dict)
    labelled: Task | None = None

    def __post_init__(self):
        if not callable(self.batches) and iter(self.batches) is self.batches:
            raise InvalidInput(
                f"{self.name}: these batches can be read only once; give a list, a dataset, or a "
                "function of the epoch"
            )

    def parts(self, epoch: int, grow: bool = False) -> Iterator[LabelledPart]:
        """The parts of all batches of an epoch.

        Args:
            grow: whether a step that is new gets an MLP.

        Raises:
            InvalidInput: a batch that is none, or a step without an MLP.
        """
        for batch in self.batches(epoch) if callable(self.batches) else self.batches:
            x, labels, fraction, step = self._read(batch)
            self.labelled, targets = encode_labels(labels, self.task, self.classes, len(x))
            targets = targets.to(x.device)
            if self.per_step != "each":
                yield LabelledPart(x, targets, fraction, 0)
                continue
            for each in step.unique().tolist():
                if each not in self.slots and not grow:
                    had = ", ".join(map(str, self.slots))
                    raise InvalidInput(f"{self.name}: step {each} trains no probe; those are {had}")
                slot = self.slots.setdefault(each, len(self.slots))
                own = step == each
                yield LabelledPart(x[own], targets[own], fraction[own], slot)

    def _read(self, batch: Any) -> tuple[Tensor, Any, Tensor, Tensor]:
        if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= 4:
            raise InvalidInput(
                f"{self.name}: a batch is (x, labels), (x, labels, fraction) or (x, labels, "
                f"fraction, step), got {type(batch).__name__}"
            )
        x, labels, fraction, step = [*batch, *[None] * (4 - len(batch))]
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInput(f"{self.name}: x must be floating point [rows, features], got {got}")
        needed = {"noise": fraction, "each": step}
        if needed.get(self.per_step, 0) is None:
            what = "fraction" if self.per_step == "noise" else "step"
            raise InvalidInput(f"{self.name}: per_step={self.per_step!r} needs the {what} of rows")
        wide = x if x.itemsize >= 4 else x.float()
        share = torch.zeros(()) if fraction is None else torch.as_tensor(fraction)
        steps = torch.zeros((), dtype=torch.int64) if step is None else torch.as_tensor(step)
        share, steps = (each.to(x.device).expand(len(x)) for each in (share.float(), steps))
        return wide, labels, share, steps


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows to train on tells, by MLP.

    Attributes:
        mean, scale: of the features. middle, spread: of the targets of a regression.
        counts: rows of each output and in all, see `counted`.
    """

    mean: Float[Tensor, "count features"]
    scale: Float[Tensor, "count features"]
    middle: Float[Tensor, " outputs"]
    spread: Float[Tensor, " outputs"]
    counts: Tensor


def survey_rows(source: LabelledSource) -> Survey:
    """Reads all rows to train on once.

    Raises:
        InvalidInput: there are none, widths differ, or a value is not finite.
    """
    sums: dict[int, _RowSums] = {}
    targets, counts = _RowSums(), torch.zeros((), dtype=torch.int64)
    for part in source.parts(0, grow=True):
        sums.setdefault(part.slot, _RowSums()).add(part.x, source.name)
        targets.add(part.targets.float(), source.name)
        assert source.labelled is not None
        counts = counts + count_rows(source.labelled, part.targets)
    if not sums:
        raise InvalidInput(f"{source.name}: there are no rows")
    each = [sums[slot].moments() for slot in range(len(sums))]
    mean, scale = (torch.stack(found) for found in zip(*each, strict=True))
    return Survey(mean, scale, *targets.moments(), counts)


class _RowSums:
    """Mean and deviation of rows that come in batches, in float64."""

    def __init__(self):
        self.rows = 0
        self.shift: Tensor | None = None
        self.total = self.square = torch.zeros(())

    def add(self, x: Tensor, name: str) -> None:
        if not len(x):
            return
        if self.shift is None:
            self.shift = x[0].double()
        if self.shift.shape != x.shape[1:]:
            raise InvalidInput(f"{name}: rows have {x.shape[1]} features, before {len(self.shift)}")
        label = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        found = moments(x, label, 1, shift=self.shift)
        if not bool(found.square.isfinite().all()):
            raise InvalidInput(f"{name}: values are not finite")
        self.rows += len(x)
        self.total = self.total.to(x.device) + found.total[0]
        self.square = self.square.to(x.device) + found.square[0]

    def moments(self) -> tuple[Tensor, Tensor]:
        assert self.shift is not None
        off = self.total / self.rows
        variance = (self.square / self.rows - off.square()).clamp(min=0)
        mean = self.shift + off
        floor = 1e-6 * (mean.abs() + variance.sqrt())
        scale = torch.where(variance.sqrt() > floor, variance.sqrt(), 1.0)
        return mean.float(), scale.float()
