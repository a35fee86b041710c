"""What speaks for a direction: how it separates rows that were kept out, and its controls."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """How a site's direction was found and how far it holds; one number for each recorded step.

    Attributes:
        steps: indices of the recorded steps; () where one direction serves all.
        rows: source and target rows in the fit.
        held_out: source and target rows that had no part in it.
        norm: length of the difference of means, whatever the method and norm.
        split_half: cosine of the directions of two halves of the rows in the fit.
        auc: probability that a target row that was kept out lies further along the direction than a
            source row; 0.5 is chance.
        auc_shuffled: the same of a direction fitted after the labels were shuffled. `pca` finds its
            axis without labels: there only the sign is shuffled.
        auc_random: the same of a random direction.

    All are NaN where there are no rows to tell.
    """

    steps: tuple[int, ...]
    rows: tuple[int, int]
    held_out: tuple[int, int]
    norm: tuple[float, ...]
    split_half: tuple[float, ...]
    auc: tuple[float, ...]
    auc_shuffled: tuple[float, ...]
    auc_random: tuple[float, ...]


def auc(source: Float[Tensor, " n"], target: Float[Tensor, " m"]) -> float:
    """The share of pairs in which the target scores above the source; ties count half.

    Formula: 1/(n m) #{source < target} + 1/2 #{source = target}

    Returns:
        From 0 to 1; NaN where a side has no score or a score is NaN.

    Reference:
        Hanley and McNeil, The meaning and use of the area under a ROC curve (1982).
    """
    if not len(source) or not len(target) or bool(torch.cat([source, target]).isnan().any()):
        return float("nan")
    ranked = source.sort().values
    below = torch.searchsorted(ranked, target, side="left")
    upto = torch.searchsorted(ranked, target, side="right")
    return float((below + upto).double().mean()) / (2 * len(source))


def cosine(a: Float[Tensor, " features"], b: Float[Tensor, " features"]) -> float:
    """Cosine of the angle between two vectors; NaN where one has no length."""
    return float(a @ b / (a.norm() * b.norm()))
