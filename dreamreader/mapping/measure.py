"""What is summed over pairs and what a map makes of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap
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


class Similarities:
    """Products of sampled mapped and target rows, both less the mean of the target."""

    def __init__(self, z: Tensor, y: Tensor, chunk: int = 512):
        self.cross = torch.cat([part @ y.T for part in z.split(chunk)])  # [n, n]
        self.squares = float(z.square().sum()), float(y.square().sum())
        self._lengths = y.norm(dim=1).clamp(min=1e-300)

    def retrieval(self) -> float:
        """Share of rows nearest to their own; of equal ones each is as likely."""
        score = self.cross / self._lengths
        own = score.diagonal().unsqueeze(1)
        reach = 1e-9 * score.abs().amax(1, keepdim=True)
        above = (score > own + reach).any(1)
        ties = ((score - own).abs() <= reach).sum(1)
        return float(torch.where(above, 0.0, 1.0 / ties).mean())


class MappedPairs:
    """Sums over blocks of pairs and of what a map makes of them."""

    def __init__(self, own: ActivationMap, held: PairedRows, sample: int, seed: int):
        device = held.x.device
        self.pairs = CrossMoments(own.d_source, own.d_target, gram=True, device=device)
        self.mapped = CrossMoments(own.d_target, own.d_target, gram=True, device=device)
        cosines = weight = 0.0
        real = None if held.weights is None else (held.weights > 0).flatten()
        count = held.x.shape[0] * held.tokens if real is None else int(real.sum())
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:sample]
        wanted, seen = order.sort().values.to(device), 0
        kept: list[tuple[Tensor, Tensor]] = []
        for block in held.blocks():
            x, y, w = block.flat()
            z = map_rows(own, block)
            z = z.flatten(0, 1) if w is None else z.flatten(0, 1)[block.weights.flatten() > 0]  # pyright: ignore
            self.pairs.add(x, y, w)  # which refuses source rows before what they are mapped to
            _check_finite(own, z)
            self.mapped.add(z, y, w)
            similarity = torch.cosine_similarity(z.double(), y.double(), dim=1)
            cosines += float(similarity.sum() if w is None else (similarity * w).sum())
            weight += float(len(x) if w is None else w.sum())
            inside = wanted[(wanted >= seen) & (wanted < seen + len(x))] - seen
            kept.append((z[inside].double(), y[inside].double()))
            seen += len(x)
        if not weight:
            raise InvalidInput(f"{own.name}: there are no held-out rows that count")
        self.cosine = cosines / weight
        self._kept = [torch.cat(each) for each in zip(*kept, strict=True)]

    def similarities(self) -> Similarities:
        z, y = (each - self.pairs.target_mean for each in self._kept)
        return Similarities(z, y)


def map_rows(own: ActivationMap, block: PairedRows) -> Float[Tensor, "sequences tokens d_target"]:
    """What a map makes of the source rows of pairs, float32 at least; padding included."""
    x = block.x.to(torch.promote_types(block.x.dtype, torch.float32))
    if block.weights is not None:  # what stands in padding may not be finite
        x = torch.where((block.weights > 0).unsqueeze(2), x, 0)
    return own.apply(x, step=block.steps, level=block.levels)


def _check_finite(own: ActivationMap, rows: Tensor) -> None:
    bad = int((~rows.isfinite().all(1)).sum())
    if bad:
        raise InvalidInput(f"{own.name}: {bad} of {len(rows)} mapped rows are not finite")
