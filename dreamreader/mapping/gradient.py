"""Maps that are trained by gradients: affine, and with one hidden layer."""

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader._hashing import hash_values
from dreamreader._progress import Progress
from dreamreader.fitting import Recipe, fit
from dreamreader.mapping.maps import AffineMap, MLPMap
from dreamreader.mapping.options import RECIPE
from dreamreader.mapping.problem import MapProblem
from dreamreader.mapping.rows import PairedRows


def fit_affine(
    problem: MapProblem,
    *,
    recipe: Recipe = RECIPE,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = True,
) -> AffineMap:
    """y = W x + b by gradients: what ridge does in closed form, for comparison.

    Args:
        recipe: AdamW at 1e-4 in batches of 64 for 3 epochs by default, validated each epoch; a
            mapping changes some of its fields.
        folder: of a checkpoint, from which the same call goes on. progress: see `fitting.fit`.
    """
    d_source, d_target = problem.train.d_source, problem.train.d_target
    net = nn.Linear(d_source, d_target)
    scales, settings = _train(problem, nn.Sequential(net), recipe, folder, progress)
    weight = net.weight.detach().double() * (scales.y / scales.x)
    bias = scales.y * net.bias.detach().double() + scales.y_mean - weight @ scales.x_mean
    values = (each.float().cpu() for each in (scales.x_mean, weight, bias))
    return AffineMap(*values).with_card(settings=settings)


def fit_mlp(
    problem: MapProblem,
    *,
    hidden: int | None = None,
    recipe: Recipe = RECIPE,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = True,
) -> MLPMap:
    """One hidden layer with relu, by gradients; see `MLPMap`.

    Args:
        hidden: its width; int(sqrt(d_source d_target)) by default.
        recipe, folder, progress: as in `fit_affine`.
    """
    d_source, d_target = problem.train.d_source, problem.train.d_target
    width = int((d_source * d_target) ** 0.5) if hidden is None else hidden
    first, second = nn.Linear(d_source, width), nn.Linear(width, d_target)
    net = nn.Sequential(first, nn.ReLU(), second)
    scales, settings = _train(problem, net, recipe, folder, progress)
    weight_in = first.weight.detach().double() / scales.x
    bias_in = first.bias.detach().double() - weight_in @ scales.x_mean
    weight_out = scales.y * second.weight.detach().double()
    bias_out = scales.y * second.bias.detach().double() + scales.y_mean
    values = (scales.x_mean, weight_in, bias_in, weight_out, bias_out)
    made = MLPMap(*(each.float().cpu() for each in values))
    return made.with_card(settings=settings | {"hidden": width})


class _Scales:
    """Means, and one standard deviation for all dimensions, of both sides; float64."""

    def __init__(self, problem: MapProblem):
        moments = problem.moments
        self.x_mean, self.y_mean = moments.source_mean, moments.target_mean
        self.x = _standard_deviation(
            moments.source_scatter.trace(), moments.weight * moments.d_source
        )
        self.y = _standard_deviation(
            moments.target_squares.sum(), moments.weight * moments.d_target
        )

    def apply(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides with mean 0 and standard deviation 1, float32."""
        one = (x.double() - self.x_mean.to(x.device)) / self.x
        return one.float(), ((y.double() - self.y_mean.to(y.device)) / self.y).float()


class _RowBatches:
    """Batches of scaled rows in an order of their epoch."""

    def __init__(
        self, rows: PairedRows, where: Tensor | None, scales: _Scales, size: int, seed: int
    ):
        self.x, self.y = rows.x.flatten(0, 1), rows.y.flatten(0, 1)
        self.weights = None if rows.weights is None else rows.weights.flatten()
        counted = torch.ones(len(rows), rows.tokens, dtype=torch.bool, device=rows.x.device)
        if rows.weights is not None:
            counted &= rows.weights.to(counted.device) > 0
        if where is not None:
            counted &= where.to(counted.device).unsqueeze(1)
        self.index = counted.flatten().nonzero().flatten()  # rows are not copied
        self.scales, self.size, self.seed, self.epoch = scales, size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.index) // self.size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.index), generator=generator).to(self.x.device)
        for part in order.split(self.size):
            chosen = self.index[part]
            weights = None if self.weights is None else self.weights[chosen].float()
            yield *self.scales.apply(self.x[chosen], self.y[chosen]), weights

    def identity(self) -> Any:
        rows = [self.index, self.x, self.y, self.weights]
        return hash_values([*rows, self.size, self.seed])


def _train(
    problem: MapProblem,
    net: nn.Sequential,
    recipe: Recipe,
    folder: str | os.PathLike[str] | None,
    progress: Progress,
) -> tuple[_Scales, dict[str, Any]]:
    """Trains a net on scaled pairs; it ends as the best on held-out pairs."""
    split = problem.split()
    scales, device = _Scales(split), split.rows.x.device
    varied = float(split.held_moments.target_squares.sum())  # which refuses what is not finite
    generator = torch.Generator().manual_seed(recipe.seed)
    for layer in net:
        if isinstance(layer, nn.Linear):
            _draw(layer, generator)
    net.to(device)
    batches = _RowBatches(split.rows, split.fitted, scales, recipe.batch_size, recipe.seed)
    proof = _RowBatches(split.held_rows, split.chosen, scales, 4096, 0)

    @torch.no_grad()
    def validate() -> float:
        total = weight = 0.0
        for batch in proof:
            own = float(len(batch[0]) if batch[2] is None else batch[2].sum())
            total += float(_loss(net, batch)) * own
            weight += own
        return total / weight

    history = fit(net, _loss, batches, recipe, folder, progress, validate=validate)
    squares = validate() * split.held_moments.weight * problem.train.d_target * scales.y**2
    fvu = squares / varied if varied > 0 else math.nan
    if fvu >= 1:
        warnings.warn(
            f"{problem.what}: after {len(history.losses)} steps its FVU on held-out pairs is "
            f"{fvu:.3g}, no better than their mean; train longer or at another rate (recipe=), or "
            "take a closed form, such as ridge",
            stacklevel=6,
        )
    net.cpu()
    scales.x_mean, scales.y_mean = scales.x_mean.cpu(), scales.y_mean.cpu()
    done = {"steps": len(history.losses), "best": history.best, "held_out_fvu": fvu}
    return scales, {"recipe": recipe.describe()} | done


def _loss(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    x, y, weights = batch
    error = (net(x) - y).square().mean(1)
    return error.mean() if weights is None else (weights * error).sum() / weights.sum()


@torch.no_grad()
def _draw(layer: nn.Linear, generator: torch.Generator) -> None:
    """First values between +- 1 / sqrt(inputs), from a generator of its own."""
    reach = layer.in_features**-0.5
    for value in (layer.weight, layer.bias):
        value.copy_((2 * torch.rand(value.shape, generator=generator) - 1) * reach)


def _standard_deviation(squares: Tensor, count: float) -> float:
    found = float(squares / count) ** 0.5
    return found if found > 0 else 1.0
