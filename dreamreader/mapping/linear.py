"""Linear maps in closed form: identity, mean, Procrustes, ridge, reduced rank, anchors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.maps import AffineMap
from dreamreader.mapping.problem import FEW, MapProblem
from dreamreader.mapping.ridge import (
    LAMBDAS,
    RidgePath,
    reduce_rank,
    solve_ridge,
)


def fit_identity(problem: MapProblem) -> AffineMap:
    """y = x, cut off where the target is narrower, and with zeros behind where it is wider."""
    moments = problem.moments
    weight = torch.eye(moments.d_target, moments.d_source, device=moments.device)
    return make_affine(problem, weight, weight.new_zeros(moments.d_target), {})


def fit_mean(problem: MapProblem) -> AffineMap:
    """y = the mean of the target, whatever x is: the control that knows nothing of it."""
    moments = problem.moments
    weight = torch.zeros(moments.d_target, moments.d_source, device=moments.device)
    return make_affine(problem, weight, moments.target_mean, {})


def fit_procrustes(problem: MapProblem, *, scale: bool = False) -> AffineMap:
    """y - mean_y = s R (x - mean_x) with R orthogonal, in closed form.

    Formula: R = U V' with U S V' = scatter_yx, thin; s = 1, or trace(S) / trace(R scatter_xx R').
        Of unequal widths R has orthonormal columns (wider target) or rows (narrower target): it
        maximises <y, R x>, which for rows is not the least squared error.

    Args:
        scale: whether s is fitted.

    Raises:
        InvalidInput: the pairs do not determine R.

    Reference:
        Schönemann, A generalized solution of the orthogonal Procrustes problem (1966).
    """
    moments = problem.moments
    u, s, vh = torch.linalg.svd(moments.cross_scatter.T, full_matrices=False)
    least = min(moments.d_source, moments.d_target)
    rank = int((s > s.max() * max(u.shape[0], vh.shape[1]) * torch.finfo(s.dtype).eps).sum())
    if rank < least or moments.rows <= least:
        raise InvalidInput(
            f"procrustes: {moments.rows} pairs have a cross-covariance of rank {rank}, which "
            f"leaves part of a rotation of {least} dimensions open; valid with so few: {FEW}"
        )
    rotation = u @ vh
    factor = 1.0
    if scale:
        factor = float(s.sum() / ((rotation @ moments.source_scatter) * rotation).sum())
    weight = factor * rotation
    bias = moments.target_mean - weight @ moments.source_mean
    return make_affine(problem, weight, bias, {"scale": factor})


def fit_ridge(problem: MapProblem, *, lambdas: Sequence[float] = LAMBDAS) -> AffineMap:
    """Least squares with a penalty that is chosen on held-out pairs; see `solve_ridge`.

    Args:
        lambdas: penalties as shares of the mean variance of x, one or several; a single one needs
            no held-out pairs, 0 is least squares.

    Raises:
        InvalidInput: see `solve_ridge`.
    """
    problem = problem.split() if len(lambdas) > 1 else problem
    path = solve_ridge(problem, lambdas)
    return make_affine(problem, path.weight, path.bias, describe_path(path, lambdas))


def fit_reduced_rank(
    problem: MapProblem,
    *,
    rank: Sequence[int] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
) -> AffineMap:
    """The best map of low rank in closed form; see `reduce_rank`.

    The penalty is chosen first, at full rank.

    Args:
        rank: of several the best on held-out pairs is taken; by default powers of 2 and the full
            rank. lambdas: as for ridge.

    Raises:
        InvalidInput: a rank is above the smaller width; see `solve_ridge`.

    Reference:
        Izenman, Reduced-rank regression for the multivariate linear model (1975).
    """
    full = min(problem.train.d_source, problem.train.d_target)
    powers = [2**power for power in range(full.bit_length()) if 2**power < full]
    ranks = [*powers, full] if rank is None else list(rank)
    if max(ranks) > full:
        raise InvalidInput(f"reduced_rank: ranks are from 1 to {full}, got {max(ranks)}")
    problem = problem.split() if len(ranks) > 1 or len(lambdas) > 1 else problem
    path = solve_ridge(problem, lambdas)
    weight, bias, best, errors = reduce_rank(problem, path, ranks)
    settings = describe_path(path, lambdas) | {"rank": best, "ranks": ranks}
    return make_affine(problem, weight, bias, settings | {"held_out_fvu_of_ranks": list(errors)})


def fit_anchors(
    problem: MapProblem, *, count: int = 512, rcond: float = 0.1, seed: int = 0
) -> AffineMap:
    """Through similarities to anchors: pairs of rows of which both sides are known.

    Formula: with anchors a_i of the source and t_i of the target, less their mean and scaled to
        length 1, as the rows of A and T: y - mean_y = g T^+ A (x - mean_x); A (x - mean_x) is the
        cosines to the anchors times the length of x - mean_x, and g the factor of the least error.
        But for g no product of x and y enters: only which anchor belongs to which.

    Args:
        count: anchors, drawn from the pairs; at most as many as there are.
        rcond: singular values of T below this share of the largest count as 0; small ones magnify
            what the two sides do not have in common.
        seed: of the draw.

    Raises:
        InvalidInput: there are only moments.

    Reference:
        Kim and Han, Cross-family universality of behavioral axes via anchor-projected
        representations, arXiv:2605.09875, which carries directions so; lengths are ours.
    """
    moments = problem.moments
    x, y, _ = problem.rows.flat()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
    source = _unit(x[chosen].to(moments.source_mean) - moments.source_mean)
    target = _unit(y[chosen].to(moments.target_mean) - moments.target_mean)
    weight = torch.linalg.pinv(target, rtol=rcond) @ source
    given = ((weight @ moments.source_scatter) * weight).sum()
    weight *= (weight.T * moments.cross_scatter).sum() / given.clamp(min=1e-300)
    bias = moments.target_mean - weight @ moments.source_mean
    return make_affine(problem, weight, bias, {"count": len(chosen), "rcond": rcond, "seed": seed})


def make_affine(
    problem: MapProblem, weight: Tensor, bias: Tensor, settings: dict[str, Any]
) -> AffineMap:
    """An affine map in float32 around the mean of the source, on the CPU."""
    values = (problem.moments.source_mean, weight, bias)
    made = AffineMap(*(each.float().cpu() for each in values))
    return made.with_card(settings=settings)


def describe_path(path: RidgePath, lambdas: Sequence[float]) -> dict[str, Any]:
    """What was chosen, for the card."""
    return {"lambda": path.chosen, "lambdas": list(lambdas), "held_out_fvu": list(path.held_out)}


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
