"""What maps reach that know nothing of the pairs: random ones, and pairs that were shuffled."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.mapping.moments import CrossMoments
from dreamreader.mapping.rows import PairedRows


@dataclass(frozen=True)
class MapControl:
    """The FVU of controls of one kind.

    Attributes:
        fvu: of each draw, ascending. p: how likely a draw is as good as the map; None where there
            is nothing to draw. cosine: mean, None where not measured.
    """

    fvu: tuple[float, ...]
    p: float | None
    cosine: float | None = None

    def quantiles(self, low: float = 0.05, high: float = 0.95) -> tuple[float, float, float]:
        """A low quantile of the FVU, its median, and a high one."""
        values = torch.tensor(self.fvu, dtype=torch.float64)
        at = torch.tensor([low, 0.5, high], dtype=torch.float64)
        one, two, three = values.quantile(at).tolist()
        return one, two, three

    def as_dict(self) -> dict[str, Any]:
        """Plain values: quantiles in place of all draws."""
        low, median, high = self.quantiles()
        own = {"fvu_q05": low, "fvu_median": median, "fvu_q95": high, "draws": len(self.fvu)}
        return own | {"p": self.p, "cosine": self.cosine}

    @classmethod
    def beside(cls, fvu: float, draws: Tensor) -> "MapControl":
        """Draws beside the FVU of a map."""
        hits = int((draws <= fvu).sum())
        return cls(tuple(draws.sort().values.tolist()), (1 + hits) / (1 + len(draws)))


def random_maps(
    pairs: CrossMoments, variance: float, fvu: float, draws: int, generator: torch.Generator
) -> dict[str, MapControl]:
    """The FVU of random linear maps, without making one.

    A map z = mean_y + s G (x - mean_x) with standard normal G [d_target, d_source] has the FVU
    1 - 2 s t / v + s^2 q / v, with v = trace(scatter_yy), t = <G', scatter_xy> and
    q = trace(G scatter_xx G'). In the eigenbasis L, Q of scatter_xx, where G is as normal,
    column j gives q the share L_j |g_j|^2 and t the share <g_j, p_j>, p_j row j of Q' scatter_xy:
    with n_j standard normal and c_j chi-squared of d_target - 1, these are L_j (n_j^2 + c_j) and
    |p_j| n_j, which is all that is drawn.

    Args:
        pairs: held-out moments. variance: sum of squares about its mean of what the map gives; the
            maps of `random` are scaled to give as much, those of `random, scaled` have the s that
            is best for each, t / q.
        fvu: of the map. draws: how many.
    """
    values, vectors = torch.linalg.eigh(pairs.source_scatter)
    sizes = (vectors.T @ pairs.cross_scatter).norm(dim=1).cpu()
    values = values.clamp(min=0).cpu()
    shape = (draws, pairs.d_source)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    rest = torch.zeros(shape, dtype=torch.float64)
    if pairs.d_target > 1:
        own = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        rest = torch.from_numpy(own.chisquare(pairs.d_target - 1, shape))
    q, t = (normal.square() + rest) @ values, normal @ sizes
    total = float(pairs.target_squares.sum())
    scale = (variance / q.clamp(min=1e-300)).sqrt()
    equal = 1 + (variance - 2 * scale * t) / total
    best = 1 - t.square() / q.clamp(min=1e-300) / total
    return {
        "random": MapControl.beside(fvu, equal),
        "random, scaled": MapControl.beside(fvu, best),
    }


def find_exchangeable(
    held: PairedRows, sample: int, generator: torch.Generator
) -> Int[Tensor, "groups places"] | None:
    """Rows at the same places of all groups: what a group has may stand for what another has there.

    The rows of a group (a prompt's tokens and calls) depend on each other, so that shuffling them
    one by one would count one picture as many. A place is a step, the number among the sequences of
    this group and step, and a token.

    Args:
        sample: rows that are drawn: groups, then places that all of these have.

    Returns:
        Their numbers among all rows; None where there are fewer than two groups or no such place.
    """
    tokens = held.tokens
    groups = torch.arange(len(held)) if held.groups is None else held.groups.cpu()
    steps = torch.zeros_like(groups) if held.steps is None else held.steps.cpu()
    known = groups.unique()
    if len(known) < 2:
        return None
    known = known[torch.randperm(len(known), generator=generator)[:sample]]
    table = _sequences_by_place(groups, steps, known)
    real = torch.ones(table.shape[1], tokens, dtype=torch.bool)
    if held.weights is not None:
        real = (held.weights.cpu() > 0)[table].all(0)
    places = real.flatten().nonzero().flatten()
    if not len(places):
        return None
    chosen = torch.randperm(len(places), generator=generator)[: max(1, sample // len(table))]
    places = places[chosen]
    return (table[:, places // tokens] * tokens + places % tokens).to(held.x.device)


def _sequences_by_place(groups: Tensor, steps: Tensor, known: Tensor) -> Tensor:
    """[known groups, places]: the sequence at each place that all of them have."""
    own = torch.isin(groups, known).nonzero().flatten()
    known, _ = known.sort()
    group = torch.searchsorted(known, groups[own])
    step = steps[own].unique(return_inverse=True)[1]
    key = group * len(own) + step
    order = key.argsort(stable=True)
    number = torch.empty_like(order)  # among the sequences of this group and step
    number[order] = torch.arange(len(own)) - torch.searchsorted(key[order], key[order])
    place = step * (int(number.max()) + 1) + number
    table = torch.full((len(known), int(place.max()) + 1), -1)
    table[group, place] = own
    return table[:, (table >= 0).all(0)]


def shuffled_pairs(
    z: Float[Tensor, "groups places d"],
    y: Float[Tensor, "groups places d"],
    draws: int,
    generator: torch.Generator,
) -> MapControl:
    """The FVU of a map's groups of rows beside the target rows of other groups.

    Args:
        z, y: mapped and target rows, both less the mean of the target; see `find_exchangeable`.
        draws: how many orders of the groups, each once where there are not more: then p cannot be
            below one over their number.
    """
    n = len(z)
    cross = z.flatten(1) @ y.flatten(1).T
    mapped, target = float(z.square().sum()), float(y.square().sum())
    mass = max(target, 1e-300)
    if math.factorial(min(n, 20)) - 1 <= draws:
        order = torch.tensor(list(itertools.permutations(range(n)))[1:])
    else:
        order = torch.stack([torch.randperm(n, generator=generator) for _ in range(draws)])
    flat = cross.flatten().cpu()
    sums = flat[torch.arange(n) * n + order].sum(1)
    own = (mapped + target - 2 * float(cross.trace())) / mass
    return MapControl.beside(own, (mapped + target - 2 * sums) / mass)
