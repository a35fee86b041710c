"""Ablations: take out what a site carries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dreamreader.edits.base import ChannelEdit, check_finite, per_site, row_length
from dreamreader.edits.patch import source_table
from dreamreader.edits.simple import check_direction
from dreamreader.edits.steer import unit
from dreamreader.engine import Activation, Cache, EditContext, row_means
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import Instruction

KINDS = ("zero", "mean", "resample", "project", "noise")
_NEEDS = {"mean": "source", "resample": "source", "project": "direction"}


@dataclass(frozen=True, eq=False)
class Ablate(ChannelEdit):
    """Takes out the selected values.

    Formula: zero 0; mean the mean of the source; resample the value of another row of the source;
    project x - V'Vx for an orthonormal basis V of the directions, with one_sided x - max(c, 0) v;
    noise x + sigma e with e standard normal. Each is blended with x by `strength`; a strength of 2
    mirrors at what `project` leaves.

    Args:
        kind: `zero`, `mean`, `resample`, `project` or `noise`.
        direction: project: [features] or [m, features], m <= 64, any length and angle; also by
            site. With per_step [steps, features] or [steps, m, features].
        source: mean: a tensor [features] or [tokens, features], or an `Activation` or `Cache`,
            whose mean over rows is taken at the same token, step and branch. resample: an
            `Activation` or `Cache`.
        from_rows: resample: row of the source for each row; drawn from `seed` by default.
        sigma: noise: standard deviation, one number or one for each row.
        seed: noise and resample: row i draws from seed + i, whatever batch it is in.
        one_sided: project: remove only positive components (one direction).
        strength: share that is taken out, one number or one for each row.
        per_step: project: the direction has one entry for each step; all zeros remove nothing.
        norm_match: project: rescale each token to the norm that it had before this edit.

    Raises:
        UnknownName: there is no such kind.
        InvalidInput: the kind lacks what it needs, or values are not finite.

    Example:
        >>> Ablate("unet.**.attn2", "project", direction=torch.ones(3)).kind
        'project'
    """

    kind: str = "zero"
    direction: Tensor | Mapping[str, Tensor] | None = field(default=None, kw_only=True)
    source: Any = field(default=None, kw_only=True)
    from_rows: int | Sequence[int] | None = field(default=None, kw_only=True)
    sigma: float | Sequence[float] | Tensor = field(default=1.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    one_sided: bool = field(default=False, kw_only=True)
    strength: float | Sequence[float] | Tensor = field(default=1.0, kw_only=True)
    per_step: bool = field(default=False, kw_only=True)
    norm_match: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in KINDS:
            raise UnknownName("kind of ablation", self.kind, KINDS)
        needed = _NEEDS.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise InvalidInput(f"Ablate: kind {self.kind!r} needs {needed}")
        for name in ("direction", "source"):
            if getattr(self, name) is not None and name != needed:
                raise InvalidInput(f"Ablate: kind {self.kind!r} takes no {name}")
        for name in ("per_step", "norm_match"):
            if getattr(self, name) and self.kind != "project":
                raise InvalidInput(f"Ablate: {name} belongs to kind 'project', not {self.kind!r}")
        if isinstance(self.direction, Tensor) and self.direction.numel():  # rank 0 is allowed
            check_finite("Ablate: direction", self.direction)
        if isinstance(self.source, Tensor):
            check_finite("Ablate: source", self.source)
        check_finite("Ablate: strength", self.strength)
        check_finite("Ablate: sigma", self.sigma)

    @property
    def is_function(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kind == "noise"

    @property
    def changes_with_step(self) -> bool:
        cached = isinstance(self.source, Activation | Cache | Mapping)
        return self.kind == "noise" or self.per_step or cached

    @property
    def keeps_norm(self) -> bool:
        return self.norm_match

    def row_lengths(self) -> dict[str, int]:
        names = ("strength", "sigma", "from_rows")
        found = {k: v for name in names for k, v in row_length(name, getattr(self, name)).items()}
        if self.kind in ("noise", "resample"):
            found.setdefault("seed", 1)  # what a row gets depends on its number
        return found

    def instructions(self, place: EditContext) -> list[Instruction]:
        strength = place.strength(self.strength, "strength")
        channels = place.channel_mask(self.heads, self.channels)
        if self.kind == "zero":
            return [
                Instruction("fill", strength, vectors=torch.zeros(place.width), channels=channels)
            ]
        if self.kind == "project":
            return self._project(place, strength, channels)
        source, rows = self.source, self.from_rows
        if self.kind == "mean":
            source, rows = self._mean(place), 0
        elif rows is None:
            rows = self._donors(place)
        table, index = source_table(source, rows, place, f"Ablate ({self.kind})", strength)
        return [Instruction("patch", strength, source=table, index=index, channels=channels)]

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        """x with normal noise; every row draws its own, from its seed, step and branch."""
        sigma = place.per_row(self.sigma, "sigma")
        share = place.per_row(self.strength, "strength")
        amount = (sigma * share).to(x.device).reshape(-1, 1, 1)
        moment = place.instant
        time = 0 if moment is None else 2 * moment.step + moment.evaluation
        draws = []
        for name in place.branches:
            for row in range(place.rows):
                mixed = hash((self.seed + place.first + row, time, *name.encode()))
                generator = torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
                draws += [self._draw_noise(x, len(draws), place, generator)] * place.beams
        noise = torch.stack(draws).to(x.device)
        y = torch.where(amount == 0, x, (x.float() + amount * noise).to(x.dtype))
        channels = place.channel_mask(self.heads, self.channels)
        return y if channels is None else torch.where(channels.to(x.device), y, x)

    def _draw_noise(
        self, x: Tensor, entry: int, place: EditContext, generator: torch.Generator
    ) -> Tensor:
        """Normal numbers of one batch entry [tokens, width], none of them for its padding."""
        own = place.own
        if own is None or len(own) == 1 or bool((own[entry] >= 0).all()):
            return torch.randn(x.shape[1:], generator=generator)
        found, real = torch.zeros(x.shape[1:]), own[entry] >= 0
        found[real] = torch.randn(int(real.sum()), x.shape[2], generator=generator)
        return found

    def _project(
        self, place: EditContext, strength: Tensor, channels: Tensor | None
    ) -> list[Instruction]:
        assert self.direction is not None
        value = per_site(self.direction, place.site, "Ablate: direction")
        if self.per_step and value.dim() > 1:
            value = value[place.step_of(value.shape[0], "direction")]
        if value.numel() == 0 or (self.per_step and not bool((value != 0).any())):
            return []  # a subspace of rank 0 removes nothing
        vectors = place.vectors(value, self.heads, "direction")
        if channels is not None:
            vectors = vectors * channels.to(vectors.device)
        check_direction("Ablate", vectors)
        if self.one_sided and len(vectors) > 1:
            raise InvalidInput(f"Ablate: one_sided needs one direction, got {len(vectors)}")
        basis = unit(vectors) if len(vectors) == 1 else _basis(vectors)
        found = Instruction(
            "project", strength, vectors=basis, channels=channels, one_sided=self.one_sided
        )
        if not self.norm_match:
            return [found]
        touched = (strength.detach() != 0).float()
        return [found, Instruction("renorm", touched, channels=channels)]

    def _mean(self, place: EditContext) -> Any:
        if not isinstance(self.source, Activation | Cache):
            return self.source
        try:
            found = self.source if isinstance(self.source, Activation) else self.source[place.site]
        except UnknownName as error:
            raise InvalidInput(
                f"Ablate at {place.site}: the cache has no values of this site"
            ) from error
        return row_means(found)

    def _donors(self, place: EditContext) -> list[int]:
        """For each row of the run another row of the source, by its own seed."""
        found = self.source if isinstance(self.source, Activation) else self.source[place.site]
        count = len(found.rows)
        if count == 1:
            return [0] * place.total
        donors = []
        for row in range(place.total):
            generator = torch.Generator().manual_seed(self.seed + row)
            shift = 1 + int(torch.randint(count - 1, (), generator=generator))
            donors.append((row + shift) % count)
        return donors


def _basis(vectors: Tensor) -> Tensor:
    """Orthonormal rows that span the same space; directions that depend on others are left out."""
    wide = vectors.detach().to(torch.float64)
    _, sizes, basis = torch.linalg.svd(wide, full_matrices=False)
    kept = sizes > sizes.max() * max(wide.shape) * torch.finfo(torch.float32).eps
    return basis[kept].to(torch.promote_types(vectors.dtype, torch.float32))
