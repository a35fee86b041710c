"""Stitch: a site gets what another model's activations are mapped to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dreamreader.edits.base import check_finite, row_length
from dreamreader.edits.patch import cached_values, same_tokens, take_rows
from dreamreader.engine import UNTIMED, Activation, EditContext, EditRequest, join, parse
from dreamreader.errors import InvalidInput


class Translation(Protocol):
    """What maps a source's activations [..., tokens, d_source] to [..., tokens, d_target]."""

    def apply(self, x: Tensor, *, step: Any = None, level: Any = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Donation:
    """What a source has for the rows of one batch at one call.

    Attributes:
        values: [rows, branches, tokens, d_source]; of branches as many as the batch has, or one for
            all.
        positions: [rows, tokens] index of each token among its row's own, -1 where there is none;
            None where every token stands at its place.
        level: ratio of noise to signal at the call, where known.
    """

    values: Tensor
    positions: Tensor | None = None
    level: float | None = None


class StitchSource(Protocol):
    """What knows the source's activations while the target runs, such as a model in lock-step."""

    def donate(self, place: EditContext) -> Donation | None:
        """What belongs to a call of the target; None: nothing does, and it stays as it is."""
        ...


@dataclass(frozen=True, eq=False)
class Stitch(EditRequest):
    """Replaces or blends a site with the map of another model's activations.

    Formula: (1 - strength) h + strength map(source); exactly h at 0 and map(source) at 1.

    Args:
        site: of the target, one.
        source: an `Activation` that was recorded in the source, whose steps and branches are those
            of the target; or a `StitchSource`, which is asked at every call.
        map: anything with `apply(x, step=, level=)`, such as a map of `dreamreader.mapping`; None
            takes the source as it is.
        strength: one number, or one for each row; below 0 and above 1 too.
        from_rows: which rows of a recording each row takes, as in `Patch`.
        levels: ratio of noise to signal at each step of a recording, for maps that depend on it.
        partial: tokens of a text that the source lacks stay as they are; else they are refused.

    Raises:
        InvalidInput: at the run, where the source has not the rows, step, branches or tokens, the
            map leads to another site, or widths do not fit.

    Example:
        >>> cache = reader.run("a red star", record="unet.mid_block").cache   # doctest: +SKIP
        >>> Stitch("unet.mid_block", cache["unet.mid_block"], ridge, strength=0.5)  # doctest: +SKIP

    Reference:
        Revisiting Model Stitching to Compare Neural Representations, arXiv:2106.07682.
    """

    source: Activation | StitchSource
    map: Translation | None = None
    strength: float | Sequence[float] | Tensor = field(default=1.0, kw_only=True)
    from_rows: int | Sequence[int] | None = field(default=None, kw_only=True)
    levels: Sequence[float] | None = field(default=None, kw_only=True)
    partial: bool = field(default=False, kw_only=True)

    is_function = True

    def __post_init__(self):
        super().__post_init__()
        check_finite("Stitch: strength", self.strength)
        if self.map is not None and not callable(getattr(self.map, "apply", None)):
            raise InvalidInput(
                f"Stitch: map needs apply(x, step=, level=), got {type(self.map).__name__}"
            )
        if isinstance(self.source, Activation):
            check_finite("Stitch: source", self.source.tensor)
            count = len(self.source.steps)
            if self.levels is not None and len(self.levels) != count:
                raise InvalidInput(
                    f"Stitch: {len(self.levels)} levels for the {count} steps of the source"
                )
        elif not callable(getattr(self.source, "donate", None)):
            raise InvalidInput(
                "Stitch: source is an Activation, or has donate(place), got "
                f"{type(self.source).__name__}; of a Cache give one site, cache[site]"
            )

    @property
    def changes_with_step(self) -> bool:
        return True

    @property
    def selects(self) -> bool:
        return True

    def touched(self, place: EditContext) -> Tensor:
        return place.strength(self.strength, "strength")

    def row_lengths(self) -> dict[str, int]:
        return row_length("strength", self.strength) | row_length("from_rows", self.from_rows)

    def check(self, place: EditContext) -> None:
        leads = [_canonical(each) for each in getattr(self.map, "sites", ())]
        if leads and place.site not in leads:
            raise InvalidInput(
                f"Stitch at {place.site}: the map leads to {', '.join(leads)}; stitch it there, or "
                "fit one that leads here"
            )
        width = getattr(self.map, "d_target", place.width)
        if width != place.width:
            raise InvalidInput(
                f"Stitch at {place.site}: the site has {place.width} features, the map gives "
                f"{width}"
            )

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        strength = place.strength(self.strength, "strength").to(x.device)
        given = self._donation(place)
        if given is None:
            return x
        rows, branches = given.values.shape[:2]
        if rows != place.rows or branches not in (1, len(place.branches)):
            raise InvalidInput(
                f"Stitch at {place.site}: the source has {rows} rows in {branches} branches for "
                f"{place.rows} rows in {len(place.branches)}"
            )
        y = self._mapped(given, place).to(x)  # [branches, rows, tokens, width]
        y = y.repeat_interleave(place.beams, 1) if place.beams > 1 else y
        y = y.expand(len(place.branches), -1, -1, -1).flatten(0, 1)
        if given.positions is not None and place.own is not None:
            y, strength = self._at_tokens(y, given.positions, strength, place)
        elif y.shape[1] not in (1, place.tokens):
            raise InvalidInput(
                f"Stitch at {place.site}: the site has {place.tokens} tokens, the source "
                f"{y.shape[1]}"
            )
        share = strength.unsqueeze(-1)
        if bool((share == 1).all()):
            return y.expand_as(x)
        mixed = torch.lerp(x, y.expand_as(x), share.to(x.dtype))
        return torch.where(share == 0, x, torch.where(share == 1, y, mixed))

    def _donation(self, place: EditContext) -> Donation | None:
        if not isinstance(self.source, Activation):
            return self.source.donate(place)
        values, positions = cached_values(self.source, place, "Stitch")
        rows = take_rows(self.from_rows, len(values), place, "Stitch")
        level = None
        if self.levels is not None:
            instant = place.instant or UNTIMED
            moments = [(each.step, each.evaluation) for each in self.source.steps]
            level = float(self.levels[moments.index((instant.step, instant.evaluation))])
        own = None if positions is None else positions[rows]
        return Donation(values[rows], own, level)

    def _mapped(self, given: Donation, place: EditContext) -> Tensor:
        values = given.values.transpose(0, 1).to(place.device)
        if self.map is not None:
            step = None if place.instant is None else place.instant.step
            try:
                values = self.map.apply(values, step=step, level=given.level)
            except InvalidInput as error:
                raise InvalidInput(f"Stitch at {place.site}: {error}") from error
        if values.shape[-1] != place.width:
            raise InvalidInput(
                f"Stitch at {place.site}: the site has {place.width} features, the source "
                f"{values.shape[-1]}; a map has to lead from one to the other"
            )
        return values

    def _at_tokens(
        self, y: Tensor, positions: Tensor, strength: Tensor, place: EditContext
    ) -> tuple[Tensor, Tensor]:
        """Values at the tokens of the batch that they belong to, and the strength there."""
        entries = place.over_batch(positions)  # [batch, columns]
        if self.partial:
            assert place.own is not None
            known = (entries[:, None, :] == place.own[:, :, None]) & (entries[:, None, :] >= 0)
            there = known.any(2).to(strength.device)
            strength = torch.where(there, strength, 0.0)
        token = same_tokens(entries, place, "Stitch", strength).to(y.device)
        return y.gather(1, token.unsqueeze(-1).expand(-1, -1, y.shape[2])), strength


def _canonical(site: str) -> str:
    pattern = parse(site)
    return join(pattern.path, pattern.port, pattern.stream)
