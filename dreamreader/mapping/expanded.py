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
from dreamreader.mapping.ridge import LAMBDAS, solve_ridge
from dreamreader.mapping.rows import PairedRows
from dreamreader.mapping.timed import NoiseConditionedMap, StepMaps, noise_powers

WIDEST = 16_384  # of features whose products are kept: 2 GB


def fit_local(
    problem: MapProblem,
    *,
    k: int = 3,
    grid: tuple[int, int] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
) -> LocalMap:
    """Ridge regression on k x k neighbourhoods, in closed form.

    Args:
        k: odd. grid: (height, width) of the tokens; a square by default.
        lambdas: as for ridge; shares of the mean variance of the neighbourhoods.

    Raises:
        InvalidInput: tokens are not those of the grid, or padding is among them.
    """
    rows = problem.rows
    height, width = square_grid(rows.tokens, grid)
    for given in [rows] if problem.held_out is None else [rows, problem.held_rows]:
        square_grid(given.tokens, (height, width))
        if given.weights is not None and not bool((given.weights > 0).all()):
            raise InvalidInput("local: sequences with padding have no grid")
    _check_width("local", rows.d_source * k * k)

    def neighbours(block: PairedRows) -> Tensor:
        maps = block.x.double().mT.reshape(len(block), -1, height, width)
        return unfold(maps, k, padding=k // 2).mT  # [sequences, tokens, d_source k k]

    split = problem.split() if len(lambdas) > 1 else problem
    path = solve_ridge(split.through(neighbours), lambdas)
    weight = path.weight.reshape(rows.d_target, rows.d_source, k, k)
    values = (split.moments.source_mean, weight, path.bias)
    made = LocalMap(*(each.float().cpu() for each in values), grid=(height, width))
    return made.with_card(settings=describe_path(path, lambdas) | {"k": k})


def fit_noise(
    problem: MapProblem, *, degree: int = 1, lambdas: Sequence[float] = LAMBDAS
) -> NoiseConditionedMap:
    """Ridge regression on x and its products with powers of the noise, in closed form.

    Args:
        degree: highest power; 1 is the simplest that changes with the noise.
        lambdas: as for ridge.

    Raises:
        InvalidInput: the noise levels of the pairs are not known, or all are equal.
    """
    rows = problem.rows
    logs = _levels_of(rows, "these pairs").double().log()
    if problem.held_out is not None:
        _levels_of(problem.held_rows, "the held-out pairs (validation=)")
    known = logs[logs.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    if not high > low:
        raise InvalidInput("noise: all pairs have one noise level; fit ridge in its place")
    centre, scale = (low + high) / 2, (high - low) / 2
    _check_width("noise", (degree + 1) * (rows.d_source + 1) - 1)

    def features(block: PairedRows) -> Tensor:
        levels = _levels_of(block, "these pairs")
        powers = noise_powers(levels, centre, scale, degree).to(block.x.device)
        terms = powers[:, None, :, None] * block.x.double().unsqueeze(2)
        own = powers[:, None, 1:].expand(-1, block.tokens, -1)
        return torch.cat([terms.flatten(2), own], 2)

    split = problem.split() if len(lambdas) > 1 else problem
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
        InvalidInput: the steps of the pairs are not known, a step has several noise levels, or
            cannot be fitted; says which.
    """
    rows = problem.rows
    maps, levels = [], []
    steps = _steps_of(rows, "these pairs").unique().tolist()
    for step in steps:
        own, held = _at_step(rows, step, "these pairs"), None
        try:
            if problem.held_out is not None:
                held = _at_step(problem.held_rows, step, "the held-out pairs (validation=)")
            part = MapProblem(own, held, problem.share, problem.seed, each)
            if own.levels is not None:
                levels.append(_one_level(own.levels))
            maps.append(fit(part, **options))
        except InvalidInput as error:
            raise InvalidInput(f"step {step}: {error}") from error
    settings = {"each": each, "steps": [dict(one.card.settings) for one in maps]}
    maps = [one.with_card(method=each) for one in maps]
    made = StepMaps(problem.moments.source_mean.float().cpu(), maps, steps, levels)
    return replace(made, card=replace(made.card, settings=settings))


def _steps_of(rows: PairedRows, which: str) -> Tensor:
    if rows.steps is None:
        raise InvalidInput(f"steps: the steps of {which} are not known; give PairedRows steps=")
    return rows.steps


def _levels_of(rows: PairedRows, which: str) -> Tensor:
    if rows.levels is None:
        raise InvalidInput(
            f"noise: the noise levels of {which} are not known; give PairedRows levels="
        )
    return rows.levels


def _at_step(rows: PairedRows, step: int, which: str) -> PairedRows:
    found = rows.select(_steps_of(rows, which) == step)
    if not len(found):
        raise InvalidInput(f"{which} have no such step")
    return found


def _one_level(levels: Tensor) -> float:
    """The noise level that all pairs of a step have."""
    low, high = float(levels.min()), float(levels.max())
    if high > low * (1 + 1e-6):  # which infinite ones are not
        raise InvalidInput(
            f"its pairs have noise levels from {low:.4g} to {high:.4g}, and its map would be that "
            "of none; fit 'noise', or give the pairs steps by their level"
        )
    return low


def _check_width(what: str, width: int) -> None:
    if width > WIDEST:
        gigabytes = math.ceil(width * width * 8 / 2**30)
        raise InvalidInput(
            f"{what}: its {width:,} features have products of {gigabytes} GB, at most {WIDEST:,} "
            "features are taken; choose a smaller neighbourhood or degree, or a narrower site"
        )
