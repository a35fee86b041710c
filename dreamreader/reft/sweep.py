"""Several trained adapters in one batch, each for its own rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamreader.edits import LoReFT
from dreamreader.engine import same
from dreamreader.errors import InvalidInput
from dreamreader.reft.model import Reft


def sweep(
    refts: Sequence[Reft],
    adapter: Sequence[int],
    alpha: float | Sequence[float] | Tensor = 1.0,
    **selection: Any,
) -> list[LoReFT]:
    """Edits with which each row of a run takes the adapters of one of several trainings.

    Ranks and variants may differ; smaller ranks are filled with zero rows. A row is what it would
    be with its own `Reft.edits`, up to rounding.

    Args:
        refts: trained on the same sites, all with adapters for each step or all without; `diagonal`
            only with its like.
        adapter: for each row the number of its entry in `refts`.
        alpha, selection: as in `Reft.edits`, but for `at`, in whose place `adapter` stands.

    Raises:
        InvalidInput: sites, steps or tokens differ, `diagonal` is mixed with others, `at` is given,
            or there is no training.

    Example:
        >>> refts = [Reft({"unet.mid_block": 64}, rank) for rank in (1, 4)]
        >>> [list(each.down.shape) for each in sweep(refts, [0, 1, 1])]
        [[2, 4, 64]]
    """
    if not refts or "at" in selection:
        wrong = "at is for one training" if refts else "there are no trainings"
        raise InvalidInput(f"sweep: {wrong}; adapter says which of refts a row takes")
    for label, values in (
        ("sites", [each.sites for each in refts]),
        ("steps", [each.steps for each in refts]),
        ("tokens", [each.tokens for each in refts]),
        ("diagonal", [each.variant == "diagonal" for each in refts]),
    ):
        for other in values:
            if not same(other, values[0]):
                raise InvalidInput(f"sweep: {label} differ: {values[0]} and {other}")
    singles = [each.edits(alpha, **selection) for each in refts]
    made = []
    for edits in zip(*singles, strict=True):
        rank = max(each.down.shape[-2] for each in edits)
        filled = [_fill_rank(each, rank) for each in edits]
        down, bias, up = (torch.stack(tables) for tables in zip(*filled, strict=True))
        first = edits[0]
        common: Any = {"branch": first.branch, "steps": first.steps, "rows": first.rows}
        common |= {"tokens": first.tokens, "variant": first.variant, "adapter": list(adapter)}
        made.append(LoReFT(first.site, down, bias, up, alpha, **common))
    return made


def _fill_rank(edit: LoReFT, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """down, bias and up of an edit with zero rows up to a rank."""
    down, bias, up = edit.down, edit.bias, edit.up
    assert isinstance(down, Tensor) and isinstance(bias, Tensor) and isinstance(up, Tensor)
    more = rank - down.shape[-2]
    return F.pad(down, (0, 0, 0, more)), F.pad(bias, (0, more)), F.pad(up, (0, 0, 0, more))
