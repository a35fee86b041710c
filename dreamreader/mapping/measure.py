"""What is summed over pairs and what a map makes of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap
from dreamreader.mapping.controls import find_exchangeable
from dreamreader.mapping.moments import CrossMoments
from dreamreader.mapping.rows import PairedRows


def squared_errors(mapped: CrossMoments) -> Float[Tensor, " d_target"]:
    """Sum of w (z - y)^2 by dimension, from moments of mapped and target rows."""
    cross = mapped.cross_scatter.diagonal()
    varied = mapped.source_scatter.diagonal() - 2 * cross + mapped.target_squares
    apart = mapped.source_mean - mapped.target_mean
    return varied.clamp(min=0) + mapped.weight * apart.square()


def linear_cka(moments: CrossMoments) -> float | None:
    """Linear CKA of both sides: |scatter_xy|^2 / (|scatter_xx| |scatter_yy|), of Frobenius norms.

    Returns:
        0 to 1, also 0 where a side does not vary; None where products of y were not kept.
    """
    if not moments.gram:
        return None
    size = moments.source_scatter.norm() * moments.target_scatter.norm()
    return float(moments.cross_scatter.square().sum() / size) if size > 0 else 0.0


def retrieval(z: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """Share of mapped rows that are nearest to their own by the cosine; of equal ones each is as
    likely.
    """
    score = z @ (y / y.norm(dim=1, keepdim=True).clamp(min=1e-300)).T
    own = score.diagonal().unsqueeze(1)
    reach = 1e-9 * score.abs().amax(1, keepdim=True)
    above = (score > own + reach).any(1)
    ties = ((score - own).abs() <= reach).sum(1)
    return float(torch.where(above, 0.0, 1.0 / ties).mean())


class _Sample:
    """Rows of some numbers, gathered from blocks in their order."""

    def __init__(self, numbers: Tensor):
        self._shape = numbers.shape
        self._numbers, self._places = numbers.flatten().unique(return_inverse=True)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, start: int, z: Tensor, y: Tensor) -> None:
        inside = (self._numbers >= start) & (self._numbers < start + len(z))
        own = self._numbers[inside] - start
        self._parts.append((z[own].double(), y[own].double()))

    def about(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides less a mean, in the shape of the numbers."""
        z, y = (torch.cat(each)[self._places] - mean for each in zip(*self._parts, strict=True))
        return z.reshape(*self._shape, -1), y.reshape(*self._shape, -1)


class MappedPairs:
    """Sums over blocks of pairs and of what a map makes of them."""

    def __init__(self, own: ActivationMap, held: PairedRows, sample: int, seed: int):
        device = held.x.device
        self.pairs = CrossMoments(own.d_source, own.d_target, gram=True, device=device)
        self.mapped = CrossMoments(own.d_target, own.d_target, gram=True, device=device)
        generator = torch.Generator().manual_seed(seed)
        sampled = _Sample(_draw_rows(held, sample, generator))
        numbers = find_exchangeable(held, sample, generator)
        groups = None if numbers is None else _Sample(numbers)
        cosines = weight = 0.0
        start = 0
        for block in held.blocks():
            x, y, w = block.flat()
            whole = map_rows(own, block).flatten(0, 1)
            z = whole if block.weights is None else whole[block.weights.flatten() > 0]
            self.pairs.add(x, y, w)  # which refuses source rows before what they are mapped to
            _check_finite(own, z)
            self.mapped.add(z, y, w)
            similarity = torch.cosine_similarity(z.double(), y.double(), dim=1)
            cosines += float(similarity.sum() if w is None else (similarity * w).sum())
            weight += float(len(x) if w is None else w.sum())
            for each in (sampled, groups):
                if each is not None:
                    each.add(start, whole, block.y.flatten(0, 1))
            start += len(whole)
        if not weight:
            raise InvalidInput(f"{own.name}: there are no held-out rows that count")
        self.cosine, mean = cosines / weight, self.pairs.target_mean
        self.sampled = sampled.about(mean)  # of rows, [n, d_target]
        self.groups = None if groups is None else groups.about(mean)  # [groups, places, d_target]


def _draw_rows(held: PairedRows, sample: int, generator: torch.Generator) -> Tensor:
    """Numbers of some of the rows that count, in their order."""
    count, device = len(held) * held.tokens, held.x.device
    real = torch.arange(count, device=device)
    if held.weights is not None:
        real = real[held.weights.flatten().to(device) > 0]
    order = torch.randperm(len(real), generator=generator)[:sample]
    return real[order.sort().values.to(device)]


def map_rows(own: ActivationMap, block: PairedRows) -> Float[Tensor, "sequences tokens d_target"]:
    """What a map makes of the source rows of pairs, float32 at least; padding included."""
    x = block.x.to(torch.promote_types(block.x.dtype, torch.float32))
    if block.weights is not None:  # what stands in padding may not be finite
        x = torch.where((block.weights > 0).unsqueeze(2), x, 0)
    return own.apply(x, step=block.steps, level=block.levels).detach()


def _check_finite(own: ActivationMap, rows: Tensor) -> None:
    bad = int((~rows.isfinite().all(1)).sum())
    if bad:
        raise InvalidInput(f"{own.name}: {bad} of {len(rows)} mapped rows are not finite")
