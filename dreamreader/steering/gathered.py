"""What was gathered at one site, and the checks of what is added to it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.steering.rows import SiteRows
from dreamreader.steering.statistics import Statistics, kept_type


@dataclass
class Gathered:
    """The rows of one site; in the statistics label l has the numbers 2 l and 2 l + 1, one a half.

    Attributes:
        statistics: of the rows in the fit.
        steps, tokens: as recorded, see `SiteRows`.
        seen: rows of each label so far.
        groups: number of each group.
        held: the rows that are kept out, by label: [rows, steps, features], float32, or
            float64 where they came so.
        pairs: statistics of the differences of pairs by (source, target), numbered by half.
        paired: pairs so far.
    """

    statistics: Statistics
    steps: tuple[int, ...]
    tokens: int | None
    seen: dict[int, int] = field(default_factory=dict)
    groups: dict[Hashable, int] = field(default_factory=dict)
    held: dict[int, list[Tensor]] = field(default_factory=dict)
    pairs: dict[tuple[int, int], Statistics] = field(default_factory=dict)
    paired: int = 0

    def hold(self, rows: Tensor, labels: Int[np.ndarray, " rows"]) -> None:
        """Keeps rows that have no part in the fit."""
        for label in np.unique(labels).tolist():
            kept = rows[torch.from_numpy(labels == label).to(rows.device)]
            self.held.setdefault(label, []).append(kept.to("cpu", kept_type(kept)))

    def held_rows(self, label: int) -> Float[Tensor, "rows steps features"]:
        """The rows of a label that are kept out."""
        assert self.statistics.shape is not None
        return torch.cat([torch.zeros(0, *self.statistics.shape), *self.held.get(label, [])])


def span(steps: tuple[int, ...]) -> str:
    """Steps in a few words."""
    return f"{steps[0]} .. {steps[-1]} ({len(steps)})" if steps else "shared"


def places_of(
    at: Gathered,
    numbers: Int[np.ndarray, " rows"],
    seen: list[int],
    groups: Sequence[Hashable] | None,
) -> Int[np.ndarray, " rows"]:
    """The number of each row within its label, or that of its group."""
    if groups is not None:
        places = [at.groups.setdefault(each, len(at.groups)) for each in groups]
        return np.array(places, dtype=np.int64)
    places = np.zeros_like(numbers)
    for label, count in enumerate(seen):
        first = at.seen.get(label, 0)
        if count:
            places[np.flatnonzero(numbers == label)] = np.arange(first, first + count)
    return places


def check_pairs(first: dict[str, SiteRows], second: dict[str, SiteRows]) -> None:
    """Refuse pairs whose sides do not have the same sites, rows, steps and features."""
    if set(first) != set(second):
        alone = ", ".join(sorted(set(first) ^ set(second)))
        raise InvalidInput(f"pairs need the same sites on both sides; only one has {alone}")
    for site, a in first.items():
        b = second[site]
        if len(a.values) != len(b.values):
            sizes = f"{len(a.values)} source rows and {len(b.values)} target rows"
            raise InvalidInput(f"{site}: {sizes}; pairs need as many of both")
        if a.steps != b.steps or a.values.shape != b.values.shape:
            raise InvalidInput(
                f"{site}: the source has steps {span(a.steps)} and {a.values.shape[2]} features, "
                f"the target {span(b.steps)} and {b.values.shape[2]}"
            )
