"""Controls of a probe: what it would reach without what it claims to read.

Each is trained as the probe was and measured on the same held-out rows.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.probes.scores import score_attributes
from dreamreader.probes.train import Problem, TrainedMlps, train

WIDTH = 128


def controls(problem: Problem, trained: TrainedMlps) -> dict[str, Any]:
    """Accuracy and AUROC (or R^2), by attribute, of probes on other rows or of another capacity.

    `shuffled_labels`: the labels of the groups change hands; what is reached is chance, and the
    distance to it is the probe's selectivity. `random_feature`: Gaussian rows with the mean and
    covariance of the real ones, in which no row knows its label. `capacity_sweep`: the probe beside
    a linear one (0 hidden units), or a linear probe beside one with a hidden layer.

    Reference:
        Hewitt and Liang, Designing and interpreting probes with control tasks (2019).
    """
    seed, goal = problem.recipe.seed + 1, problem.objective
    task, loss = goal.task, goal.loss
    drawn = torch.stack([random_rows(each, seed + n) for n, each in enumerate(problem.x)])
    hidden = problem.design.hidden
    other = () if hidden else (WIDTH,)
    changed = problem.replace(design=replace(problem.design, hidden=other))
    sizes = {(hidden or (0,))[0]: trained, (other or (0,))[0]: train(changed)}
    return {
        "shuffled_labels": score_attributes(
            train(shuffle_targets(problem, seed)).held_out, task, loss
        ),
        "random_feature": score_attributes(train(problem.replace(x=drawn)).held_out, task, loss),
        "capacity_sweep": {
            str(width): score_attributes(found.held_out, task, loss)
            for width, found in sorted(sizes.items())
        },
    }


def shuffle_targets(problem: Problem, seed: int) -> Problem:
    """The problem with the targets of whole groups dealt anew, within each part of the split.

    The first row of a group stands for it: a group has one label in most data, and rows of a
    group would else tell each other's new labels.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = problem.targets.clone()
    for part in range(3):
        rows = problem.rows(part)
        order, place = problem.group[rows].unique(return_inverse=True)
        first = torch.full((len(order),), len(rows), device=rows.device)
        first.scatter_reduce_(0, place, torch.arange(len(rows), device=rows.device), "amin")
        donors = torch.randperm(len(order), generator=generator).to(rows.device)
        targets[rows] = problem.targets[rows][first[donors][place]]
    return problem.replace(targets=targets)


def random_rows(x: Float[Tensor, "rows features"], seed: int) -> Float[Tensor, "rows features"]:
    """Gaussian rows with exactly the mean and covariance of the given ones as their distribution.

    g (x - mean) / sqrt(n) with standard normal g has the covariance (x - mean)'(x - mean) / n.
    With more rows than features, a root of the covariance takes the place of x.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = x.mean(0)
    root = x - mean
    n, width = x.shape
    if n > width:
        values, vectors = torch.linalg.eigh((root.T.double() @ root.double()) / n)
        root = (vectors * values.clamp(min=0).sqrt()).T.to(x) * width**0.5
    draw = torch.randn(n, len(root), generator=generator).to(x)
    return draw @ root / len(root) ** 0.5 + mean
