"""Maps that are linear in more than x: neighbours on a grid, powers of the noise, and each step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap
from dreamreader.mapping.linear import describe_path
from dreamreader.mapping.local import LocalMap, square_grid
from dreamreader.mapping.problem import MapProblem
from dreamreader.mapping.ridge import LAMBDAS, is_choice, solve_ridge
from dreamreader.mapping.rows import PairedRows
from dreamreader.mapping.timed import NoiseConditionedMap, StepMaps, noise_powers

WIDEST = 16_384  # of features whose products are kept: 2 GB


def fit_local(
    problem: MapProblem,
    *,
    k: int = 3,
    grid: tuple[int, int] | None = None,
    lambdas: float | Sequence[float] = LAMBDAS,
) -> LocalMap:
    """Ridge regression on k x k neighbourhoods, in closed form.

    Args:
        k: odd. grid: (height, width) of the tokens; a square by default.
        lambdas: as for ridge; shares of the mean variance of the neighbourhoods.

    Raises:
        InvalidInput: tokens are not those of the grid, padding is among them, or k is not odd.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or not k % 2:
        raise InvalidInput(f"local: k is odd and at least 1, got {k!r}")
    rows = problem.rows
    height, width = square_grid(rows.tokens, grid)
    if rows.weights is not None and not bool((rows.weights > 0).all()):
        raise InvalidInput("local: sequences with padding have no grid")
    _check_width("local", rows.d_source * k * k)

    def neighbours(block: PairedRows) -> Tensor:
        maps = block.x.double().mT.reshape(len(block), -1, height, width)
        return unfold(maps, k, padding=k // 2).mT  # [sequences, tokens, d_source k k]

    split = problem.split() if is_choice(lambdas) else problem
    path = solve_ridge(split.through(neighbours), lambdas)
    weight = path.weight.reshape(rows.d_target, rows.d_source, k, k)
    values = (split.moments.source_mean, weight, path.bias)
    made = LocalMap(*(each.float().cpu() for each in values), grid=(height, width))
    return made.with_card(settings=describe_path(path, lambdas) | {"k": k})


def fit_noise(
    problem: MapProblem, *, degree: int = 1, lambdas: float | Sequence[float] = LAMBDAS
) -> NoiseConditionedMap:
    """Ridge regression on x and its products with powers of the noise, in closed form.

    Args:
        degree: highest power; 1 is the simplest that changes with the noise.
        lambdas: as for ridge.

    Raises:
        InvalidInput: the noise levels of the pairs are not known, or all are equal.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise InvalidInput(f"noise: degree is a number from 0, got {degree!r}")
    rows = problem.rows
    if rows.levels is None:
        raise InvalidInput(
            "noise: the noise levels of these pairs are not known; give PairedRows levels="
        )
    logs = rows.levels.double().log()
    known = logs[logs.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    if not high > low:
        raise InvalidInput("noise: all pairs have one noise level; fit ridge in its place")
    centre, scale = (low + high) / 2, (high - low) / 2
    _check_width("noise", (degree + 1) * (rows.d_source + 1) - 1)

    def features(block: PairedRows) -> Tensor:
        assert block.levels is not None
        powers = noise_powers(block.levels, centre, scale, degree).to(block.x.device)
        terms = powers[:, None, :, None] * block.x.double().unsqueeze(2)
        own = powers[:, None, 1:].expand(-1, block.tokens, -1)
        return torch.cat([terms.flatten(2), own], 2)

    split = problem.split() if is_choice(lambdas) else problem
    path = solve_ridge(split.through(features), lambdas)
    products = (degree + 1) * rows.d_source
    weight = path.weight[:, :products].reshape(-1, degree + 1, rows.d_source).transpose(0, 1)
    bias = torch.cat([path.bias.unsqueeze(0), path.weight[:, products:].T])
    values = (split.moments.source_mean, weight.contiguous(), bias)
    made = NoiseConditionedMap(*(each.float().cpu() for each in values), centre=centre, scale=scale)
    return made.with_card(settings=describe_path(path, lambdas) | {"degree": degree})


def fit_steps(
    problem: MapProblem,
    fit: Callable[..., ActivationMap],
    *,
    each: str = "ridge",
    **options: Any,
) -> StepMaps:
    """A map for each step of the target.

    Args:
        fit: what fits one. each: its method. options: of that method.

    Raises:
        InvalidInput: the steps of the pairs are not known, or a step cannot be fitted; says which.
    """
    rows = problem.rows
    if rows.steps is None:
        raise InvalidInput("steps: the steps of these pairs are not known; give PairedRows steps=")
    maps, levels = [], []
    steps = rows.steps.unique().tolist()
    for step in steps:
        own = rows.select(rows.steps == step)
        held = None
        if problem.held_out is not None:
            kept = problem.held_rows
            assert kept.steps is not None
            held = kept.select(kept.steps == step)
        part = MapProblem(own, held, problem.share, problem.seed, each)
        try:
            maps.append(fit(part, **options))
        except InvalidInput as error:
            raise InvalidInput(f"step {step}: {error}") from error
        if own.levels is not None:
            levels.append(float(own.levels[0]))
    settings = {"each": each, "steps": [dict(one.card.settings) for one in maps]}
    maps = [one.with_card(method=each) for one in maps]
    made = StepMaps(problem.moments.source_mean.float().cpu(), maps, steps, levels)
    return replace(made, card=replace(made.card, settings=settings))


def _check_width(what: str, width: int) -> None:
    if width > WIDEST:
        gigabytes = math.ceil(width * width * 8 / 2**30)
        raise InvalidInput(
            f"{what}: its {width:,} features have products of {gigabytes} GB, at most {WIDEST:,} "
            "features are taken; choose a smaller neighbourhood or degree, or a narrower site"
        )
