"""How a direction follows from statistics: closed forms, and one convex problem."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering.statistics import Statistics

Labels = Sequence[int]  # numbers of labels that count as one


@dataclass(frozen=True)
class FitOptions:
    """What the methods can be told.

    Args:
        shrinkage: lda: share of the covariance that is replaced by a multiple of the identity,
            0 to 1; by the data (`oas`) where None.
        l2: logistic: weight of |w|^2 / 2 beside the sum of the rows' losses, on standardised
            features; above 0.
    """

    shrinkage: float | None = None
    l2: float = 1.0

    def __post_init__(self):
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise InvalidInput(f"shrinkage must be from 0 to 1, got {self.shrinkage}")
        if not (math.isfinite(self.l2) and self.l2 > 0):
            raise InvalidInput(f"l2 must be above 0 and finite, got {self.l2}")


@dataclass(frozen=True)
class FitData:
    """Statistics of one site: which labels are source and target, and the differences of pairs.

    Args:
        statistics: of the rows.
        source, target: their labels in it.
        pairs: statistics of target - source of each pair, where rows came in pairs.
        halves: labels in `pairs` that belong to this data.
    """

    statistics: Statistics
    source: Labels
    target: Labels
    pairs: Statistics | None = None
    halves: Labels = (0, 1)

    @property
    def counts(self) -> tuple[int, int]:
        """Rows of source and target."""
        return self.statistics.count(self.source), self.statistics.count(self.target)

    @property
    def difference(self) -> Float[Tensor, "steps features"]:
        """Difference of the means."""
        return self.statistics.mean(self.target) - self.statistics.mean(self.source)


def mean(data: FitData, step: int, options: FitOptions) -> Float[Tensor, " features"]:
    """v = mean(target) - mean(source)."""
    return data.difference[step]


def pca(data: FitData, step: int, options: FitOptions) -> Float[Tensor, " features"]:
    """The unit direction along which pairs differ most (about 0), or centred rows vary most.

    Its sign is that of the difference of means: it points to the target.
    """
    if data.pairs is not None:
        found, labels, centre = data.pairs, data.halves, False
    else:
        found, labels, centre = data.statistics, [*data.source, *data.target], True
    vector = _find_leading(found, labels, step, centre)
    return torch.where(vector @ data.difference[step] < 0, -vector, vector)


def lda(data: FitData, step: int, options: FitOptions) -> Float[Tensor, " features"]:
    """v = S^-1 (mean(target) - mean(source)), S the shrunk covariance within labels.

    S = (1 - a) C + a tr(C)/d 1, C = sum of both labels' scatters / rows.

    Reference:
        Shrinkage where none is given: Chen, Wiesel, Eldar and Hero, Shrinkage algorithms for MMSE
        covariance estimation (2010), equation 23.
    """
    rows = sum(data.counts)
    scatters = [data.statistics.scatter(labels, step) for labels in (data.source, data.target)]
    covariance = (scatters[0] + scatters[1]) / rows
    size = len(covariance)
    level = covariance.trace() / size
    if level <= 0:
        raise InvalidInput("lda: rows of a label do not differ, there is no covariance to invert")
    share = oas(covariance, rows) if options.shrinkage is None else options.shrinkage
    shrunk = (1 - share) * covariance
    shrunk.diagonal().add_(share * level)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if int(failed):
        raise InvalidInput(
            f"lda: the covariance of {rows} rows over {size} features has no inverse at shrinkage "
            f"{share:g}; use a larger one, or None for one chosen from the data"
        )
    return torch.cholesky_solve(data.difference[step][:, None], factor)[:, 0]


def oas(covariance: Float[Tensor, "features features"], rows: int) -> float:
    """The share of the identity that brings a shrunk covariance nearest to the true one.

    Formula: min(1, ((1 - 2/d) tr(C^2) + tr(C)^2) / ((n + 1 - 2/d) (tr(C^2) - tr(C)^2 / d)))
    """
    size = len(covariance)
    trace, square = float(covariance.trace()) ** 2, float(covariance.square().sum())
    below = (rows + 1 - 2 / size) * (square - trace / size)
    above = (1 - 2 / size) * square + trace
    return 1.0 if below <= above else above / below


def logistic(data: FitData, step: int, options: FitOptions) -> Float[Tensor, " features"]:
    """The weight of a logistic probe that tells target from source, in units of the features.

    Minimises sum_i log(1 + exp(-y_i (u.z_i + b))) + l2/2 |u|^2 over standardised features
    z = (x - mean) / deviation, y = 1 at the target and -1 at the source; v = u / deviation.
    """
    parts = [data.statistics.rows(labels, step) for labels in (data.source, data.target)]
    rows = torch.cat(parts)  # [n, features]
    y = torch.cat([torch.full((len(parts[0]),), -1.0), torch.full((len(parts[1]),), 1.0)])
    deviation = rows.std(0, correction=0)
    varies = deviation > 1e-12 * rows.abs().amax(0)
    scale = torch.where(varies, deviation, 1.0)
    z = torch.where(varies, (rows - rows.mean(0)) / scale, 0.0)
    return _probe(z, y.double(), options.l2) / scale


METHODS: dict[str, Callable[[FitData, int, FitOptions], Tensor]] = {
    "mean": mean,
    "caa": mean,  # the same difference, of unit length by default
    "pca": pca,
    "lda": lda,
    "logistic": logistic,
}
NEEDS = {"pca": "covariance", "lda": "covariance", "logistic": "rows"}


def check_method(method: str) -> None:
    """Raises UnknownName for a method that does not exist."""
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)


def _find_leading(found: Statistics, labels: Labels, step: int, centre: bool) -> Tensor:
    """The unit vector v [features] with the largest sum of <x, v>^2, about the mean or about 0.

    Zeros where no row differs.
    """
    if found.keep == "rows":
        x = found.rows(labels, step)
        x = x - x.mean(0) if centre else x
        if len(x) < x.shape[1]:  # x'x and xx' have the same values above 0: the smaller is solved
            vector = _largest(x @ x.T) @ x
            return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
        return _largest(x.T @ x)
    scatter = found.scatter(labels, step)
    if not centre:
        middle = found.mean(labels)[step]
        scatter = scatter + found.count(labels) * torch.outer(middle, middle)
    return _largest(scatter)


def _largest(matrix: Tensor) -> Tensor:
    """The eigenvector of the largest eigenvalue, zeros where that is 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.where(values[-1] > 0, vectors[:, -1], 0.0)


def _probe(z: Tensor, y: Tensor, l2: float) -> Tensor:
    """Weights [features] of the penalised logistic regression, by L-BFGS."""
    solution = torch.zeros(z.shape[1] + 1, dtype=torch.float64)  # weights, then the offset
    solver = torch.optim.LBFGS(
        [solution],
        max_iter=1000,
        tolerance_grad=1e-9 * len(z),
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        weights, offset = solution[:-1], solution[-1]
        margin = y * (z @ weights + offset)
        pull = -y * torch.sigmoid(-margin)  # derivative by the row's score
        solution.grad = torch.cat([z.T @ pull + l2 * weights, pull.sum()[None]])
        return torch.nn.functional.softplus(-margin).sum() + l2 / 2 * weights.square().sum()

    solver.step(loss)  # pyright: ignore[reportArgumentType]
    return solution[:-1]
