"""Patching: replace values by those of a cache, another row or another run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dreamreader.edits.base import ChannelEdit, check_finite, per_site, row_length
from dreamreader.engine import UNTIMED, Activation, Cache, EditContext, ranges
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import Instruction


@dataclass(frozen=True, eq=False)
class Patch(ChannelEdit):
    """Replaces the selected values: x + strength (source - x); exactly the source at strength 1.

    Args:
        source: an `Activation` or `Cache` (the value of the same site, step and branch is taken), a
            tensor [features], [tokens, features] or [rows, tokens, features], or the number of the
            row of the same batch that is copied, also one for each row.
        strength: one number, or one for each row.
        from_rows: for a cache or a tensor with rows: which of its rows each row takes. By default
            row i takes row i, and all rows take the only one.

    Raises:
        InvalidInput: at the run, where shape, step or row of the source do not fit.

    Example:
        >>> Patch("unet.mid_block", torch.zeros(8), steps=slice(0, 5)).describe()
        'Patch(unet.mid_block, steps=slice(0, 5, None))'
    """

    source: Any
    strength: float | Sequence[float] | Tensor = field(default=1.0, kw_only=True)
    from_rows: int | Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_finite("Patch: strength", self.strength)
        for value in _tensors(self.source):
            check_finite("Patch: source", value)

    @property
    def is_function(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._copies_row

    @property
    def _copies_row(self) -> bool:
        """Whether the source is another row of the same batch, known only while it runs."""
        numbers = self.source if isinstance(self.source, list | tuple) else [self.source]
        return all(isinstance(each, int) for each in numbers)

    @property
    def changes_with_step(self) -> bool:
        return isinstance(self.source, Activation | Cache | Mapping)

    def row_lengths(self) -> dict[str, int]:
        found = row_length("strength", self.strength) | row_length("from_rows", self.from_rows)
        if self._copies_row:
            found |= row_length("source", self.source) or {"source": 1}
        return found

    def instructions(self, place: EditContext) -> list[Instruction]:
        strength = place.strength(self.strength, "strength")
        channels = place.channel_mask(self.heads, self.channels)
        source, index = source_table(self.source, self.from_rows, place, "Patch", strength)
        return [Instruction("patch", strength, source=source, index=index, channels=channels)]

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        rows = _row_numbers(self.source, place.rows, place, "Patch: source")
        donors = [number - place.first for number in rows]
        if not all(0 <= each < place.rows for each in donors):
            raise InvalidInput(
                f"Patch at {place.site}: row {rows} is copied, but the batch holds the rows "
                f"{place.first} .. {place.first + place.rows - 1}; rows that feed each other need "
                "one batch"
            )
        whole = torch.arange(place.batch).reshape(len(place.branches), place.rows, place.beams)
        entries = whole[:, donors].flatten().tolist()
        y = x.index_select(0, torch.tensor(entries, device=x.device))
        own = place.own
        if own is not None and not bool((own == own[:1]).all()):
            strength = place.strength(self.strength, "strength")
            token = same_tokens(own[entries], place, "Patch", strength).to(x.device)
            y = y.gather(1, token.unsqueeze(-1).expand_as(y))
        share = place.per_row(self.strength, "strength").to(x.device)
        share = share.reshape(-1, 1, 1) if share.dim() else share
        y = torch.where(share == 1, y, torch.where(share == 0, x, x + share.to(x.dtype) * (y - x)))
        channels = place.channel_mask(self.heads, self.channels)
        return y if channels is None else torch.where(channels.to(x.device), y, x)


def source_table(
    source: Any, from_rows: Any, place: EditContext, label: str, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """What the patch instruction reads: source [entries, width] and index [batch, tokens].

    Args:
        strength: broadcasts to [batch, tokens]; what has 0 needs no value in the source.

    Raises:
        InvalidInput: shape, step or rows do not fit the site in the running call.
    """
    positions: Tensor | None = None
    if isinstance(source, Activation | Cache):
        values, positions = cached_values(source, place, label)  # [rows, branches, tokens, width]
    else:
        value = per_site(source, place.site, f"{label}: source")
        values = _of_tensor(value, place, label)
    count, chunks, length, width = values.shape
    by_position = positions is not None and place.own is not None
    if (not by_position and length not in (1, place.tokens)) or width != place.width:
        raise InvalidInput(
            f"{label} at {place.site}: the site has {place.tokens} tokens of {place.width} "
            f"features, the source {length} of {width}"
        )
    if not by_position and length > 1 and place.own is not None and bool((place.own < 0).any()):
        raise InvalidInput(
            f"{label} at {place.site}: the batch has padding, and which of the {length} tokens of "
            "the source belong to which of a row's own is unknown; give an Activation or a Cache"
        )
    rows = torch.tensor(take_rows(from_rows, count, place, label))
    rows = rows.repeat_interleave(place.beams)
    branch = (
        torch.arange(len(place.branches)) if chunks > 1 else torch.zeros(len(place.branches)).long()
    )
    if by_position:
        token = same_tokens(positions[rows], place, label, strength)  # pyright: ignore
    else:
        token = torch.arange(place.tokens) if length > 1 else torch.zeros(place.tokens).long()
    entry = rows[None, :] * chunks + branch[:, None]  # [branches, rows * beams]
    index = entry.reshape(-1, 1) * length + token  # [batch, tokens]
    return values.reshape(-1, width), index


def same_tokens(positions: Tensor, place: EditContext, label: str, strength: Tensor) -> Tensor:
    """[batch, tokens] for each token of the batch the column of the source that is the same token.

    Args:
        positions: [batch, columns] own index of the source's tokens, -1 at padding.
        strength: broadcasts to [batch, tokens]; what has 0 needs no column.

    Raises:
        InvalidInput: the source lacks tokens that are edited.
    """
    own = place.own
    assert own is not None
    same = positions[:, None, :] == own[:, :, None]  # [batch, tokens, columns]
    changed = place.selected if strength.requires_grad else strength  # a derivative at 0 counts
    missing = ~same.any(2) & (changed.cpu().expand(place.batch, place.tokens) != 0) & (own >= 0)
    if bool(missing.any()):
        entry = int(missing.any(1).nonzero()[0])
        lacking = ranges(own[entry][missing[entry]].tolist())
        row = place.first + entry // place.beams % place.rows
        raise InvalidInput(
            f"{label} at {place.site}: tokens {lacking} of row {row} are edited, the source has "
            f"{int((positions[entry] >= 0).sum())} tokens there and not these; limit the edit "
            "with tokens, or record them"
        )
    return same.int().argmax(2)


def take_rows(from_rows: Any, count: int, place: EditContext, label: str) -> list[int]:
    """For each row of the batch the number of the one that it takes, of a source of `count` rows.

    Raises:
        InvalidInput: it is not said, or there is no such row.
    """
    if from_rows is None and count not in (1, place.total):
        raise InvalidInput(
            f"{label} at {place.site}: the source has {count} rows, the run {place.total}; say "
            "which row takes which with from_rows"
        )
    default = 0 if count == 1 else list(range(place.total))
    chosen = default if from_rows is None else from_rows
    return _row_numbers(chosen, count, place, f"{label}: from_rows")


def _row_numbers(chosen: Any, count: int, place: EditContext, name: str) -> list[int]:
    """For each row of the batch the number of the row it takes."""
    listed = [chosen] if isinstance(chosen, int) else [int(each) for each in chosen]
    if len(listed) == 1:
        listed = listed * place.total
    if len(listed) != place.total:
        raise InvalidInput(
            f"{name} at {place.site}: has {len(listed)} values, the run has {place.total} rows"
        )
    mine = listed[place.first : place.first + place.rows]
    limit = count if "from_rows" in name else place.total
    wrong = [each for each in mine if not -limit <= each < limit]
    if wrong:
        raise InvalidInput(f"{name} at {place.site}: row {wrong[0]} asked for, there are {limit}")
    return [each % limit for each in mine]


def _of_tensor(value: Tensor, place: EditContext, label: str) -> Tensor:
    if value.dim() == 1:
        return place.vectors(value, None, f"{label}: source").reshape(1, 1, 1, -1)
    if value.dim() == 2:
        return value[None, None]
    if value.dim() == 3:
        return value[:, None]
    raise InvalidInput(
        f"{label} at {place.site}: the source is [features], [tokens, features] or [rows, tokens, "
        f"features], got {list(value.shape)}"
    )


def cached_values(source: Any, place: EditContext, label: str) -> tuple[Tensor, Tensor | None]:
    """Values and positions of a cache at the running step.

    Returns:
        [rows, branches, tokens, width], branches as in the batch, and [rows, tokens], see
        `Activation.positions`.
    """
    try:
        found = source if isinstance(source, Activation) else source[place.site]
    except UnknownName as error:
        raise InvalidInput(
            f"{label} at {place.site}: the cache has no values of this site"
        ) from error
    if found.tokens is not None and found.positions is None:
        raise InvalidInput(
            f"{label} at {place.site}: the source holds only some tokens of the site"
        )
    instant = place.instant or UNTIMED
    here = (instant.step, instant.evaluation)
    moments = [(each.step, each.evaluation) for each in found.steps]
    if here not in moments:
        steps = ", ".join(str(each.step) for each in found.steps)
        raise InvalidInput(
            f"{label} at {place.site}: the source has no step {here[0]} (it has {steps}); limit "
            "the edit with steps, or record those steps"
        )
    tensor = found.tensor
    if len(found.branches) == 1:
        tensor = tensor.unsqueeze(1)
    at = moments.index(here)
    tensor = tensor[:, :, at]  # [rows, branches, tokens, ...]
    positions = None if found.positions is None else found.positions[:, at]
    needed = [name for name, on in zip(place.branches, _branches_on(place), strict=True) if on]
    missing = [name for name in needed if name not in found.branches]
    if missing:
        raise InvalidInput(
            f"{label} at {place.site}: the source has the branches {', '.join(found.branches)}, "
            f"{missing[0]} is edited too; limit the edit with branch"
        )
    order = [found.branches.index(n) if n in found.branches else 0 for n in place.branches]
    return (tensor[:, order].flatten(3) if tensor.dim() > 4 else tensor[:, order]), positions


def _branches_on(place: EditContext) -> list[bool]:
    on = place.selected != 0
    if on.shape[0] == 1:
        return [True] * len(place.branches)
    return on.any(1).reshape(len(place.branches), -1).any(1).tolist()


def _tensors(source: Any) -> list[Tensor]:
    if isinstance(source, Tensor):
        return [source]
    if isinstance(source, Activation):
        return [source.tensor]
    if isinstance(source, Cache):
        return [each.tensor for each in source.values()]
    if isinstance(source, Mapping):
        return [each for each in source.values() if isinstance(each, Tensor)]
    return []
