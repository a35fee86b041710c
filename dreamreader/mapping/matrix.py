"""Moments of all sites of one model with all sites of another, from one recording of both."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping.moments import CrossMoments
from dreamreader.mapping.rows import PairedRows
from dreamreader.recording import Pairs
from dreamreader.stats.intervals import Interval, bootstrap
from dreamreader.stats.ranks import spearman

_FLOATS = 2**24  # numbers of a block of rows, 64 MB
_BLOCK = 4096  # rows of it at least, which a product is made of


@dataclass(frozen=True, eq=False)
class _SiteGroup:
    """Target sites with the same tokens, and the source sites that these pair with.

    Attributes:
        source, target: columns of each site. moments: of all of them side by side.
        rows: some of both, for what moments do not tell.
    """

    source: dict[str, slice]
    target: dict[str, slice]
    moments: CrossMoments
    rows: list[tuple[Tensor, Tensor]]


class MomentMatrix:
    """Cross moments of every site of a source with every site of a target, batch by batch.

    Sites of one grid are added side by side, so that each is recorded and summed once, however many
    pairs it is in; the source is brought to the grid of the target. Memory does not grow with rows.

    Args:
        sample: rows kept of each batch, for `rows`: cosines and retrieval need them. seed: of their
            draw.
        resample: how the source comes to another grid; see `recording.resample_grid`.

    Attributes:
        batches: how many were added. refused: why sites do not pair, by (source, target).

    Example:
        >>> values = torch.randn(2, 3, 4, 5, 8)
        >>> pairs = Pairs({"a": values[0], "b": 2 * values[0]}, {"c": values[1]}, None)
        >>> matrix = MomentMatrix()
        >>> matrix.add(pairs)
        >>> matrix.moments("b", "c").rows, list(matrix)
        (60, [('a', 'c'), ('b', 'c')])
    """

    def __init__(self, sample: int = 0, seed: int = 0, resample: str = "area"):
        self.sample, self.seed, self.resample = sample, seed, resample
        self.batches = 0
        self.refused: dict[tuple[str, str], str] = {}
        self._groups: list[_SiteGroup] = []

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The pairs of sites, target by target."""
        for group in self._groups:
            for target in group.target:
                yield from ((source, target) for source in group.source)

    def add(self, pairs: Pairs) -> None:
        """Adds a recording of all sites.

        Raises:
            InvalidInput: its sites are not those of before, or a row is not finite.
        """
        if not self._groups:
            self._groups = list(self._group(pairs))
        for group in self._groups:
            self._add(group, pairs)
        self.batches += 1

    def moments(self, source: str, target: str) -> CrossMoments:
        """Of one pair of sites, with products of the target (gram=True).

        Raises:
            UnknownName: there is no such pair.
        """
        group = self._of(source, target)
        return group.moments.part(group.source[source], group.target[target])

    def rows(self, source: str, target: str) -> PairedRows:
        """The rows of one pair of sites that were kept.

        Raises:
            UnknownName: there is no such pair.
        """
        group = self._of(source, target)
        x, y = (torch.cat(each) for each in zip(*group.rows, strict=True))
        return PairedRows(
            x[:, group.source[source]],
            y[:, group.target[target]],
            source_site=source,
            target_site=target,
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and plain values, from which `of_state` goes on."""
        tensors: dict[str, Tensor] = {}
        groups = []
        for n, group in enumerate(self._groups):
            tensors |= {f"{n}.{name}": each for name, each in group.moments.state_dict().items()}
            if group.rows:
                x, y = (torch.cat(each) for each in zip(*group.rows, strict=True))
                tensors |= {f"{n}.x": x, f"{n}.y": y}
            groups.append([_sizes(group.source), _sizes(group.target)])
        refused = [[*pair, why] for pair, why in self.refused.items()]
        own = {"sample": self.sample, "seed": self.seed, "resample": self.resample}
        return tensors, {**own, "batches": self.batches, "groups": groups, "refused": refused}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> "MomentMatrix":
        """What `state_dict` was taken of."""
        found = cls(values["sample"], values["seed"], values["resample"])
        found.batches = values["batches"]
        found.refused = {(one, other): why for one, other, why in values["refused"]}
        for n, sides in enumerate(values["groups"]):
            group = _empty(*(dict(each) for each in sides))
            names = ("counts", "shift", "total", "cross", "target")
            group.moments.load_state_dict({name: tensors[f"{n}.{name}"] for name in names})
            if f"{n}.x" in tensors:
                group.rows.append((tensors[f"{n}.x"], tensors[f"{n}.y"]))
            found._groups.append(group)
        return found

    def _group(self, pairs: Pairs) -> Iterator[_SiteGroup]:
        """Target sites that the same source sites pair with, at as many tokens."""
        found: dict[Any, tuple[list[str], list[str]]] = {}
        for target, values in pairs.target.items():
            grid = None if pairs.grids is None else pairs.grids[1].get(target)
            sources = []
            for source in pairs.source:
                try:
                    pairs.few(1).values_at(source, target, self.resample)
                except InvalidInput as error:
                    self.refused[source, target] = str(error)
                else:
                    sources.append(source)
            found.setdefault((grid, values.shape[2], *sources), (sources, []))[1].append(target)
        for sources, targets in found.values():
            if sources:
                yield _empty(
                    {site: pairs.source[site].shape[3] for site in sources},
                    {site: pairs.target[site].shape[3] for site in targets},
                )
        if not any(sources for sources, _ in found.values()):
            raise InvalidInput(f"no two sites pair: {next(iter(self.refused.values()))}")

    def _add(self, group: _SiteGroup, pairs: Pairs) -> None:
        first = next(iter(group.target))
        tokens = pairs.target[first].shape[2]
        weights = None
        if pairs.counts is not None:
            weights = pairs.token_weights(next(iter(group.source)), torch.arange(pairs.rows)) > 0
            weights = weights.double().unsqueeze(1).expand(-1, pairs.calls, -1)  # [rows, calls, n]
        kept = self._draw(weights, pairs.rows * pairs.calls * tokens)
        width = group.moments.d_source + group.moments.d_target
        per_row = tokens * pairs.calls
        size = max(1, max(_FLOATS // width, _BLOCK) // per_row)
        for start in range(0, pairs.rows, size):
            part = pairs.few(size, start)
            x = _beside(part.values_at(site, first, self.resample)[0] for site in group.source)
            y = _beside(part.target[site] for site in group.target)
            own = None if weights is None else weights[start : start + size].reshape(-1)
            group.moments.add(x, y, own)
            inside = kept[(kept >= start * per_row) & (kept < start * per_row + len(x))]
            if len(inside):
                place = inside - start * per_row
                group.rows.append((x[place].float(), y[place].float()))

    def _draw(self, weights: Tensor | None, count: int) -> Tensor:
        """Numbers of the rows of this batch that are kept, ascending."""
        real = torch.arange(count) if weights is None else weights.flatten().nonzero().flatten()
        generator = torch.Generator().manual_seed(self.seed + self.batches)
        order = torch.randperm(len(real), generator=generator)[: self.sample]
        return real[order.sort().values]

    def _of(self, source: str, target: str) -> _SiteGroup:
        for group in self._groups:
            if source in group.source and target in group.target:
                return group
        raise UnknownName(
            "pair of sites", f"{source} -> {target}", [f"{a} -> {b}" for a, b in self]
        )


def correlate_success(
    scores: Mapping[str, Float[np.ndarray, " pairs"]], success: Float[np.ndarray, " pairs"]
) -> dict[str, Interval]:
    """Whether what is measured before stitching puts pairs of sites in the order of its success.

    Args:
        scores: by name, of each pair. success: of stitching there.

    Returns:
        Spearman's rank correlation by name, with an interval from drawing pairs with replacement.

    Raises:
        InvalidInput: there are fewer than 3 pairs, or a value is not finite.

    Example:
        >>> scores = {"cka": np.array([0.2, 0.5, 0.9, 0.4])}
        >>> correlate_success(scores, np.array([0.1, 0.6, 0.8, 0.3]))["cka"].value
        1.0
    """
    if len(success) < 3:
        raise InvalidInput(
            f"stitching: {len(success)} pairs of sites have a success; an order needs 3"
        )
    return {
        name: bootstrap(np.stack([each, success], 1), lambda rows: spearman(rows[:, 0], rows[:, 1]))
        for name, each in scores.items()
    }


def _empty(source: Mapping[str, int], target: Mapping[str, int]) -> _SiteGroup:
    moments = CrossMoments(sum(source.values()), sum(target.values()), gram=True)
    return _SiteGroup(_columns(source), _columns(target), moments, [])


def _columns(sizes: Mapping[str, int]) -> dict[str, slice]:
    ends = list(accumulate(sizes.values()))
    starts = [0, *ends[:-1]]
    return {site: slice(*ends_of) for site, *ends_of in zip(sizes, starts, ends, strict=True)}


def _sizes(columns: Mapping[str, slice]) -> list[list[Any]]:
    return [[site, each.stop - each.start] for site, each in columns.items()]


def _beside(parts: Iterator[Tensor]) -> Float[Tensor, "rows d"]:
    return torch.cat([each.flatten(0, 2) for each in parts], 1)
