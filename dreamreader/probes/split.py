"""Which rows train a probe, which choose among its states, and which only measure it."""

import math
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from dreamreader.errors import InvalidInput

TRAIN, VALIDATION, HELD_OUT = 0, 1, 2


def number_groups(groups: Sequence[Hashable], rows: int) -> Int[Tensor, " rows"]:
    """The number of each row's group, from 0 in the order in which they come.

    Raises:
        InvalidInput: there are not as many as rows.
    """
    if len(groups) != rows:
        raise InvalidInput(f"groups: {len(groups)} for {rows} rows")
    order: dict[Hashable, int] = {}
    listed = groups.tolist() if isinstance(groups, Tensor) else groups
    return torch.tensor([order.setdefault(each, len(order)) for each in listed])


def deal_groups(
    groups: Int[Tensor, " rows"], targets: Tensor, holdout: int, seed: int
) -> Int[Tensor, " rows"]:
    """TRAIN, VALIDATION or HELD_OUT for each row; a group stays together.

    Groups are shuffled, sorted by the targets of their first row and dealt in turn, so that every
    class has its share of each part.

    Args:
        holdout: one group of so many validates, and one is held out.

    Raises:
        InvalidInput: nothing would be held out.
    """
    count = int(groups.max()) + 1
    if holdout < 3 or count < holdout:
        raise InvalidInput(
            f"holdout={holdout}: no row is held out of {count} groups; 3 to {count} are possible"
            if count >= 3
            else f"{count} groups of rows cannot be split into rows to train on, to validate, and "
            "held out"
        )
    first = torch.full((count,), -1)
    for row in reversed(range(len(groups))):
        first[groups[row]] = row
    keys = [tuple(each) for each in targets[first].tolist()]
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    part = torch.full((count,), TRAIN)
    for place, group in enumerate(sorted(shuffled, key=keys.__getitem__)):
        if place % holdout >= holdout - 2:
            part[group] = VALIDATION if place % holdout == holdout - 2 else HELD_OUT
    assert math.prod(int((part == each).sum()) for each in (TRAIN, VALIDATION, HELD_OUT))
    return part[groups]
