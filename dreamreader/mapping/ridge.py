"""Ridge regression and its reduced ranks, in closed form from moments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.moments import CrossMoments
from dreamreader.mapping.problem import FEW, MapProblem

LAMBDAS = tuple(10.0**power for power in range(-8, 3))


class RidgePath(NamedTuple):
    """Ridge solutions for many penalties, from one eigendecomposition, and the one that is chosen.

    Attributes:
        weight: [d_target, d_source]. bias: [d_target]. chosen: its lambda.
        held_out: FVU of each lambda on what is held out; () with a single lambda.
        penalty: what is added to the scatter of x at the chosen lambda.
    """

    weight: Tensor
    bias: Tensor
    chosen: float
    held_out: tuple[float, ...]
    penalty: float


class _HeldProducts(NamedTuple):
    """Products of held-out pairs about the means of those that were fitted to."""

    source: Tensor
    cross: Tensor
    squares: float
    variance: float  # about their own mean

    @classmethod
    def of(cls, held: CrossMoments, train: CrossMoments) -> "_HeldProducts":
        n = held.weight
        dx, dy = held.source_mean - train.source_mean, held.target_mean - train.target_mean
        variance = float(held.target_squares.sum())
        if not variance > 0:
            raise InvalidInput("held-out target rows are all equal: there is nothing to choose by")
        return cls(
            held.source_scatter + n * dx.outer(dx),
            held.cross_scatter + n * dx.outer(dy),
            variance + n * float(dy.square().sum()),
            variance,
        )


def solve_ridge(problem: MapProblem, lambdas: Sequence[float]) -> RidgePath:
    """Ridge regression with an intercept, its penalty chosen on what is held out.

    Formula: minimises sum |y - W x - b|^2 + lambda s |W|^2, s = trace(scatter of x) / d_source, so
        that lambda has no unit; with the scatter Q L Q': W' = Q (L + lambda s)^-1 Q' scatter_xy.
        A penalty costs d_source^2 more to judge: with D = (L + lambda s)^-1 and P = Q' scatter_xy,
        the error is  v - 2 diag(Q' V_xy P')' D + D' ((Q' V_xx Q) * (P P')) D  of held-out V.

    Args:
        problem: with something held out, where there are several lambdas.
        lambdas: one or several, see `check_lambdas`.

    Raises:
        InvalidInput: a lambda is 0 where the scatter of x has not full rank.
    """
    train = problem.moments
    values, vectors = torch.linalg.eigh(train.source_scatter)
    values = values.clamp(min=0)
    scale = float(values.mean())
    if not scale > 0:
        raise InvalidInput(
            f"{problem.what}: all source rows are equal, so nothing follows from them"
        )
    if 0.0 in lambdas:
        check_full_rank(problem.what, train, values)
    cross = vectors.T @ train.cross_scatter  # [d_source, d_target]
    shrink = [1 / (values + each * scale) for each in lambdas]
    errors: list[float] = []
    if len(lambdas) > 1:
        held = _HeldProducts.of(problem.held_moments, train)
        quadratic = (vectors.T @ held.source @ vectors) * (cross @ cross.T)
        first = ((vectors.T @ held.cross) * cross).sum(1)
        for d in shrink:
            error = held.squares - 2 * float(first @ d) + float(d @ quadratic @ d)
            errors.append(error / held.variance)
    best = min(range(len(lambdas)), key=lambda n: errors[n]) if errors else 0
    weight = (vectors @ (shrink[best].unsqueeze(1) * cross)).T
    bias = train.target_mean - weight @ train.source_mean
    chosen = lambdas[best]
    return RidgePath(weight, bias, chosen, tuple(errors), chosen * scale)


def reduce_rank(
    problem: MapProblem, path: RidgePath, ranks: Sequence[int]
) -> tuple[Tensor, Tensor, int, tuple[float, ...]]:
    """The best map of a rank, chosen on what is held out where there are several.

    Formula: W_r = V_r V_r' W with V_r the first eigenvectors of W (scatter_xx + penalty) W', which
        is the minimum of the ridge problem over maps of rank r; all ranks from one decomposition.

    Returns:
        Weight, bias, rank, and the FVU of each rank on what is held out; () with a single one.
    """
    train, weight = problem.moments, path.weight
    fitted = weight @ train.source_scatter @ weight.T + path.penalty * (weight @ weight.T)
    vectors = torch.linalg.eigh(fitted)[1].flip(1)  # largest first
    errors: tuple[float, ...] = ()
    if len(ranks) > 1:
        held = _HeldProducts.of(problem.held_moments, train)
        own = vectors.T @ weight  # [d_target, d_source]
        gain = ((own @ held.source) * own).sum(1) - 2 * ((own @ held.cross) * vectors.T).sum(1)
        total = held.squares + gain.cumsum(0)
        errors = tuple(float(total[rank - 1]) / held.variance for rank in ranks)
    best = ranks[min(range(len(ranks)), key=lambda n: errors[n]) if errors else 0]
    top = vectors[:, :best]
    found = top @ (top.T @ weight)
    return found, train.target_mean - found @ train.source_mean, best, errors


def check_full_rank(what: str, train: CrossMoments, eigenvalues: Tensor) -> None:
    """Refuses least squares that have no unique answer.

    Raises:
        InvalidInput: there are fewer pairs than dimensions (says what is valid then), or the
            covariance has a lower rank.
    """
    d = train.d_source
    if train.rows <= d:
        raise InvalidInput(
            f"{what}: {train.rows} pairs do not determine a map from {d} source dimensions; valid "
            f"with fewer pairs than dimensions: {FEW}"
        )
    # products of rows in float32 leave noise of about this size
    rank = int((eigenvalues > eigenvalues.max() * d * torch.finfo(torch.float64).eps).sum())
    if rank < d:
        raise InvalidInput(
            f"{what}: the source covariance has rank {rank} of {d}, so lambda = 0 has no unique "
            f"answer; valid with such a covariance: {FEW}"
        )
