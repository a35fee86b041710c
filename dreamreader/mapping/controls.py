"""What maps reach that know nothing of the pairs: random ones, and pairs that were shuffled."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.moments import CrossMoments


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

    Raises:
        InvalidInput: draws is below 1.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise InvalidInput(f"controls: draws is at least 1, got {draws!r}")
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


def shuffled_pairs(
    cross: Float[Tensor, "n n"],
    mapped: float,
    target: float,
    draws: int,
    generator: torch.Generator,
) -> MapControl:
    """The FVU of a map's rows beside target rows of other pairs.

    Args:
        cross: products of mapped and target rows, both less the mean of the target.
        mapped, target: sums of their squares.
        draws: how many orders.
    """
    n = len(cross)
    mass = max(target, 1e-300)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(draws)])
    flat = cross.flatten().cpu()
    sums = flat[torch.arange(n) * n + order].sum(1)
    own = (mapped + target - 2 * float(cross.trace())) / mass
    return MapControl.beside(own, (mapped + target - 2 * sums) / mass)
