"""Activations made of known features: trees of features that fire together, and lone ones."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.artifacts import Artifact
from dreamreader.errors import InvalidInput
from dreamreader.fitting import ByStep
from dreamreader.ops import SparseRows, sparse_decode

RARE = 0.01  # below it candidates are drawn, above it every feature
BLOCK = 172  # features that share a bound on their probability
ROWS = 128  # rows of which candidates are drawn at once: their logits fit the cache


@dataclass(frozen=True)
class SyntheticConfig:
    """Numbers of a distribution of features; as they stand, those of SynthSAEBench-16k.

    Attributes:
        features: how many there are. d_in: width of the activations.
        exponent, max_probability, min_probability: feature i fires with a probability that falls
            from the largest to the smallest as (i + 1)^-exponent does.
        roots, branching, depth: trees; the first `roots` features are their roots, each node down
            to `depth` has `branching` children, of which one at most fires, and only if the node
            does, scaled by how strongly. What is in no tree is alone.
        rank, correlation: of the normal factors that firing shares, and their scale.
        magnitude: mean strength of the first and of the last feature, in between linearly.
        deviation: mean and standard deviation of the normal whose absolute value is the standard
            deviation of a feature's strength.
        bias: length of the vector that is added to all activations.
        orthogonal_steps, orthogonal_lr: Adam steps that push directions apart, and their size.
        seed: of all that is drawn once. Samples have seeds of their own.

    Raises:
        InvalidInput: a number cannot be right; says which.

    Reference:
        Chanin and Garriga-Alonso, SynthSAEBench, arXiv:2602.14687; numbers and seeds as in the
        published configuration of SAELens 6.54.
    """

    features: int = 16384
    d_in: int = 768
    exponent: float = 0.5
    max_probability: float = 0.4
    min_probability: float = 5e-4
    roots: int = 128
    branching: int = 4
    depth: int = 3
    rank: int = 25
    correlation: float = 0.1
    magnitude: tuple[float, float] = (5.0, 4.0)
    deviation: tuple[float, float] = (0.5, 0.5)
    bias: float = 0.5
    orthogonal_steps: int = 100
    orthogonal_lr: float = 3e-4
    seed: int = 42

    def __post_init__(self) -> None:
        least = {"features": 1, "d_in": 1, "roots": 0, "branching": 1, "depth": 0, "rank": 1}
        least |= {"orthogonal_steps": 0, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise InvalidInput(
                    f"SyntheticConfig: {name} is a whole number of at least {smallest}, "
                    f"got {value!r}"
                )
        low, high = self.min_probability, self.max_probability
        rules = {
            f"0 < min_probability <= max_probability, got {low} and {high}": 0 < low <= high,
            f"max_probability <= 1, got {high}": high <= 1,
            f"exponent > 0, got {self.exponent}": self.exponent > 0,
            f"correlation >= 0, got {self.correlation}": self.correlation >= 0,
            f"magnitudes above 0, got {self.magnitude}": min(self.magnitude) > 0,
            f"a standard deviation of deviation >= 0, got {self.deviation}": self.deviation[1] >= 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise InvalidInput(f"SyntheticConfig: needs {rule}")


class SyntheticFeatures(Artifact, kind="synthetic-features"):
    """Draws activations whose features are known: which fire, how strongly, in which direction.

    x = b + sum_j z_j d_j. Feature j fires where f_j e + sqrt(1 - |f_j|^2) n_j > t_j with standard
    normal e [rank] that all share and n_j of its own; t_j is such that it fires with its
    probability, divided by that of its parent and raised for the siblings that it excludes.
    Its strength is normal, without the values up to 0, times its parent's over the parent's mean.

    Args:
        config: what to draw from; SynthSAEBench-16k where nothing is said.
        device: where it is drawn.
        directions: [features, d_in], as they were pushed apart before; a minute's work at 16,384.

    Attributes:
        directions: unit vectors [features, d_in]. bias: [d_in].
        probabilities: that a feature fires, before trees take effect [features].
        parents: the parent of each feature, -1 of roots and lone ones, int64 [features].
        means, deviations: of the strengths [features].

    Example:
        >>> import torch
        >>> world = SyntheticFeatures(SyntheticConfig(features=32, d_in=16, roots=2, depth=1))
        >>> x, codes = world.sample(4, torch.Generator().manual_seed(0))
        >>> x.shape, codes.rows, codes.width
        (torch.Size([4, 16]), 4, 32)
        >>> again, _ = world.batch(7, 4, seed=1)  # the same wherever and whenever it is asked for
        >>> torch.equal(again, world.batch(7, 4, seed=1)[0])
        True

    Reference:
        Chanin and Garriga-Alonso, SynthSAEBench, arXiv:2602.14687.
    """

    def __init__(
        self,
        config: SyntheticConfig | None = None,
        device: torch.device | str = "cpu",
        directions: Float[Tensor, "features d_in"] | None = None,
    ) -> None:
        self.config = c = config or SyntheticConfig()
        self.device = torch.device(device)
        self.parents = _parents(c)
        self.probabilities = zipf(c.features, c.exponent, c.max_probability, c.min_probability)
        self.means = torch.linspace(*c.magnitude, c.features)
        mean, std = c.deviation
        self.deviations = (mean + std * _normal(c.seed + 1, c.features)).abs()
        self.factor, self.noise = _factor(c)
        drawn = torch.Generator().manual_seed(c.seed)
        start = torch.randn(c.features, c.d_in, generator=drawn)
        bias = torch.randn(c.d_in, generator=drawn)
        if directions is None:
            start = (start / start.norm(dim=1, keepdim=True)).to(device)
            directions = orthogonalise(start, c.orthogonal_steps, c.orthogonal_lr)
        elif directions.shape != start.shape:
            raise InvalidInput(
                f"SyntheticFeatures: directions must be {list(start.shape)}, "
                f"got {list(directions.shape)}"
            )
        self.directions = directions.to(device)
        self.bias = (bias / bias.norm() * c.bias).to(device)
        for name in ("parents", "probabilities", "means", "deviations", "factor", "noise"):
            setattr(self, name, getattr(self, name).to(device))

    def to_file(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The directions; all else is drawn again from the seed."""
        return {"directions": self.directions}, {"config": asdict(self.config)}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        """What `to_file` described."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content["config"].items()
        }
        return cls(SyntheticConfig(**values), directions=tensors["directions"])

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "n d_in"], SparseRows]:
        """Draws n rows.

        Args:
            n: how many. generator: of the device; without one, torch's own.

        Returns:
            Activations [n, d_in] and the strengths of the features that fired, n rows of width
            `features`.
        """
        codes = self.sample_codes(n, generator)
        return self.activations(codes), codes

    def batch(
        self, index: int, n: int, seed: int = 0
    ) -> tuple[Float[Tensor, "n d_in"], SparseRows]:
        """Draws batch `index` of a stream: a function of its index, size and seed.

        The same on the same machine with the same number of threads; elsewhere a feature may fire
        or not by the last bit of a product.
        """
        return self.sample(n, self._generator(index, seed))

    def batches(self, n: int, seed: int = 0) -> ByStep:
        """Activations of `batch`es for `fit`, one for each step."""
        of = {"synthetic": self.config, "rows": n, "seed": seed}
        return ByStep(lambda step: self.batch(step, n, seed)[0], of=of)

    def sample_codes(self, n: int, generator: torch.Generator | None = None) -> SparseRows:
        """Draws which features fire in n rows and how strongly, without their activations."""
        if n < 0:
            raise InvalidInput(f"SyntheticFeatures: a number of rows is at least 0, got {n}")
        draw = _Draw(generator, self.device)
        shared = draw.normal(n, self.config.rank)
        parts = [*self._trees(shared, draw), *self._lone(shared, draw)]
        return _merge(parts, n, self.config.features)

    def activations(self, codes: SparseRows) -> Float[Tensor, "n d_in"]:
        """The activations that these strengths give, [rows, d_in]."""
        return sparse_decode(codes, self.directions, self.bias)

    def _generator(self, index: int, seed: int) -> torch.Generator:
        # torch's generator of the CPU reads 32 bits: sums are distinct, hashes would collide
        first = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return torch.Generator(self.device).manual_seed((first + index) % 2**32)

    def _trees(self, shared: Tensor, draw: "_Draw") -> Iterator["_Fired"]:
        """Level by level, as children need to know whether their parent fired."""
        c, table = self.config, self._table
        level = self._each(shared, slice(0, min(c.roots, c.features)), draw)
        yield level
        parents = len(table.child_offset)
        for _ in range(c.depth):
            inner = level.feature < parents
            row, parent, value = level.row[inner], level.feature[inner], level.value[inner]
            slope = table.child_slope.index_select(0, parent)
            logit = (slope @ shared.index_select(0, row).unsqueeze(-1)).squeeze(-1)
            logit += table.child_offset.index_select(0, parent)
            chance = torch.special.ndtr(logit) * table.child_positive.index_select(0, parent)
            fires = draw.uniform(*chance.shape) < chance
            rivals = torch.where(fires, draw.uniform(*chance.shape), -1.0)
            winner = rivals.argmax(1)
            some = fires.any(1)
            row, parent, value = row[some], parent[some], value[some]
            child = c.roots + c.branching * parent + winner[some]
            strength = self._strength(child, draw) * (value / self.means[parent])
            level = _Fired(row, child, strength)
            yield level

    def _lone(self, shared: Tensor, draw: "_Draw") -> Iterator["_Fired"]:
        """Features of no tree: every frequent one, candidates of the rare ones."""
        first, rare = self._table.lone
        if first < rare:
            yield self._each(shared, slice(first, rare), draw)
        if rare < self.config.features:
            begins = range(0, max(len(shared), 1), ROWS)
            found = [self._candidates(shared[at : at + ROWS], at, draw) for at in begins]
            row, feature = (torch.cat(each) for each in zip(*found, strict=True))
            yield _Fired(row, feature, self._strength(feature, draw))

    def _each(self, shared: Tensor, part: slice, draw: "_Draw") -> "_Fired":
        table = self._table
        logit = _affine(shared, table.affine[:, part])
        chance = torch.special.ndtr(logit) * table.positive[part]
        row, place = (draw.uniform(*chance.shape) < chance).nonzero(as_tuple=True)
        feature = place + part.start
        return _Fired(row, feature, self._strength(feature, draw))

    def _candidates(self, shared: Tensor, begin: int, draw: "_Draw") -> tuple[Tensor, Tensor]:
        """Rows and features of the rare ones that fire, exactly as `_each` would draw them.

        A feature of probability q has a point at least in a Poisson process of rate -log(1 - q);
        points are drawn at the largest rate of a block and kept with the ratio of the rates.
        """
        table = self._table
        logit = _affine(shared, table.rare)  # [n, width]
        width = logit.shape[1]
        peak = logit.view(-1, table.block).amax(1)
        rate = -torch.special.log_ndtr(-peak)  # [n * blocks]
        points = torch.poisson(rate * table.block, draw.generator).long()
        cell = torch.repeat_interleave(points)
        within = (draw.uniform(len(cell)) * table.block).long()
        place = cell * table.block + within.clamp_(max=table.block - 1)  # row * width + feature
        chance = torch.special.ndtr(logit.view(-1).index_select(0, place))
        chance *= table.rare_positive.index_select(0, place % width)
        keep = draw.uniform(len(cell)) * rate.index_select(0, cell) < -torch.log1p(-chance)
        fired = place[keep].unique()
        return fired // width + begin, fired % width + self._table.lone[1]

    def _strength(self, feature: Tensor, draw: "_Draw") -> Tensor:
        mean, deviation = self.means[feature], self.deviations[feature]
        value = mean + deviation * draw.normal(len(feature))
        while len(again := (value <= 0).nonzero().squeeze(1)):
            value[again] = mean[again] + deviation[again] * draw.normal(len(again))
        return value

    @cached_property
    def _table(self) -> "_FiringTables":
        return _FiringTables.of(self)


@dataclass(frozen=True)
class _Fired:
    """Entries in ascending order of row and feature."""

    row: Tensor
    feature: Tensor
    value: Tensor


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator | None
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device, dtype=dtype)

    def integer(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)


@dataclass(frozen=True)
class _FiringTables:
    """What samples read: a feature fires with the probability Phi(slope e + offset) of a normal.

    `positive` is the probability that a strength is above 0, as only such a feature fires.
    """

    affine: Tensor  # [rank + 1, features], the offset last
    positive: Tensor
    child_slope: Tensor  # [parents, branching, rank]
    child_offset: Tensor  # [parents, branching]; -inf where there is no such child
    child_positive: Tensor
    lone: tuple[int, int]  # first of no tree, first rare one
    block: int
    rare: Tensor  # [rank + 1, blocks * block]
    rare_positive: Tensor

    @classmethod
    def of(cls, world: SyntheticFeatures) -> "_FiringTables":
        c = world.config
        chance = compensate(world.probabilities, world.parents).double()
        slope = world.factor / world.noise[:, None]
        offset = (torch.special.ndtri(chance) / world.noise.double()).float()
        positive = torch.special.ndtr(world.means / world.deviations)
        tree = _tree_size(c)
        parents = -(-max(tree - c.roots, 0) // c.branching)

        def child(values: Tensor, fill: float) -> Tensor:
            own = _pad(values[c.roots : tree], parents * c.branching, fill)
            return own.view(parents, c.branching, *values.shape[1:])

        common = int((world.probabilities[tree:] >= RARE).sum())
        rare = tree + common
        left = c.features - rare
        block = min(BLOCK, max(left, 1))
        size = -(-left // block) * block
        return cls(
            torch.cat([slope, offset[:, None]], 1).T.contiguous(),
            positive,
            child(slope, 0.0),
            child(offset, -torch.inf),
            child(positive, 1.0),
            (tree, rare),
            block,
            torch.cat(
                [_pad(slope[rare:], size, 0.0), _pad(offset[rare:, None], size, -torch.inf)], 1
            ).T.contiguous(),
            _pad(positive[rare:], size, 1.0),
        )


def zipf(count: int, exponent: float, high: float, low: float) -> Float[Tensor, " count"]:
    """Probabilities that fall from high to low as (i + 1)^-exponent does."""
    raw = torch.arange(1, count + 1, dtype=torch.float32) ** -exponent
    span = raw[0] - raw[-1]
    return low + (high - low) * ((raw - raw[-1]) / span if count > 1 else raw)


def compensate(
    probabilities: Float[Tensor, " features"], parents: Int[Tensor, " features"]
) -> Float[Tensor, " features"]:
    """Probabilities before trees take effect that give about these ones after it.

    p_j / p_parent (1 + sum of the siblings' p / p_parent), at most 1: where a parent is too rare
    for its children, they stay below their probability.
    """
    child = parents >= 0
    parent = parents[child]
    own, above = probabilities[child], probabilities[parent]
    family = torch.zeros_like(probabilities).index_add_(0, parent, own)[parent]
    raised = probabilities.clone()
    raised[child] = own / above * (1 + (family - own).clamp(min=0) / above)
    return raised.clamp(max=1.0)


def orthogonalise(
    directions: Float[Tensor, "features d_in"], steps: int, lr: float
) -> Float[Tensor, "features d_in"]:
    """Pushes unit vectors apart by Adam on the squares of their products, and scales them to 1.

    sum_{i != j} <d_i, d_j>^2 + n sum_i (|d_i|^2 - 1)^2; its gradient
    4 (D D'D - |d_i|^2 d_i + n (|d_i|^2 - 1) d_i) needs no table [features, features].

    Returns:
        New memory.
    """
    found = directions.clone()
    optimizer = torch.optim.Adam([found], lr=lr)
    for _ in range(steps):
        square = found.square().sum(1, keepdim=True)
        pull = len(found) * (square - 1) - square
        found.grad = 4 * torch.addcmul(found @ (found.T @ found), pull, found)
        optimizer.step()
    return found / found.norm(dim=1, keepdim=True)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tree_size(c: SyntheticConfig) -> int:
    """How many features are in trees, which are numbered level by level."""
    whole = sum(c.roots * c.branching**level for level in range(c.depth + 1))
    return min(whole, c.features)


def _parents(c: SyntheticConfig) -> Tensor:
    feature = torch.arange(c.features)
    child = (feature >= c.roots) & (feature < _tree_size(c))
    return torch.where(child, (feature - c.roots) // c.branching, -1)


def _factor(c: SyntheticConfig) -> tuple[Tensor, Tensor]:
    """f [features, rank] and sqrt(1 - |f|^2), at least 0.1: longer rows are cut."""
    factor = c.correlation * _normal(c.seed + 4, c.features, c.rank)
    square = factor.square().sum(1)
    cut = (0.99 / square).sqrt().clamp(max=1.0)
    factor = torch.where(square > 0.99, cut, 1.0)[:, None] * factor
    return factor, (1 - factor.square().sum(1)).sqrt()


def _affine(shared: Tensor, table: Tensor) -> Tensor:
    """slope e + offset [n, features]; 10 x faster than a product to which the offset is added."""
    return torch.nn.functional.pad(shared, (0, 1), value=1.0) @ table


def _pad(values: Tensor, size: int, fill: float) -> Tensor:
    more = values.new_full((size - len(values), *values.shape[1:]), fill)
    return torch.cat([values, more])


def _merge(parts: list[_Fired], n: int, width: int) -> SparseRows:
    """One list of all parts, each of which has larger features than those before."""
    counts = torch.stack([torch.bincount(each.row, minlength=n) for each in parts])
    ends = counts.sum(0).cumsum(0)
    row_ptr = torch.cat([ends.new_zeros(1), ends])
    begins = row_ptr[:-1] + counts.cumsum(0) - counts  # of a part's entries in a row
    size = sum(len(each.row) for each in parts)
    columns = torch.empty(size, dtype=torch.int32, device=row_ptr.device)
    values = torch.empty(size, device=row_ptr.device)
    for part, count, begin in zip(parts, counts, begins, strict=True):
        shift = begin - (count.cumsum(0) - count)
        place = torch.arange(len(part.row), device=row_ptr.device) + shift[part.row]
        columns[place] = part.feature.int()
        values[place] = part.value
    return SparseRows(row_ptr, columns, values, width)
