"""One site: from its statistics to a direction and its evidence."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.steering.directions import random_like
from dreamreader.steering.evidence import Evidence, auc, cosine
from dreamreader.steering.methods import METHODS, FitData, FitOptions
from dreamreader.steering.statistics import Statistics

NORMS = ("channel", "tensor", "none")


@dataclass(frozen=True)
class SiteData:
    """What a site's direction is fitted from.

    Args:
        statistics: of the rows in the fit.
        source, target: numbers of the label's two halves in it.
        pairs: of the differences of pairs, numbered by half; None where rows are no pairs.
        held: source and target rows [rows, steps, features] that were kept out.
        steps: indices of the recorded steps, () where one direction serves all.
        tokens: recorded tokens of a row.
    """

    statistics: Statistics
    source: tuple[int, int]
    target: tuple[int, int]
    pairs: Statistics | None
    held: tuple[Tensor, Tensor]
    steps: tuple[int, ...]
    tokens: int | None


def fit_site(
    data: SiteData, method: str, norm: str, options: FitOptions, seed: int
) -> tuple[Float[Tensor, "*steps features"], Evidence]:
    """The direction of a site and its evidence.

    Args:
        data: of the site.
        method, norm, options: as in `Fitter.fit`.
        seed: of the random control.

    Returns:
        float32 [steps of the run, features] or [features], and the evidence.
    """
    s, t, found, pairs = data.source, data.target, data.statistics, data.pairs
    whole = FitData(found, s, t, pairs)
    vectors = _vectors(method, whole, options)  # [steps, features]
    halves = [
        _try_fit(method, FitData(found, s[n : n + 1], t[n : n + 1], pairs, (n,)), options)
        for n in (0, 1)
    ]
    # Both halves have the labels in the same proportion: taken as labels, they are shuffled ones.
    shuffled = _try_fit(method, FitData(found, (s[0], t[0]), (s[1], t[1]), pairs), options)
    separated = _aucs(data, [vectors.cpu(), shuffled, random_like(vectors, seed).cpu()])
    evidence = Evidence(
        steps=data.steps,
        rows=whole.counts,
        held_out=(len(data.held[0]), len(data.held[1])),
        norm=tuple(whole.difference.norm(dim=1).tolist()),
        split_half=tuple(cosine(a, b) for a, b in zip(*halves, strict=True)),
        auc=separated[0],
        auc_shuffled=separated[1],
        auc_random=separated[2],
    )
    return _lay_out(_scale(vectors, norm, data.tokens).float().cpu(), data.steps), evidence


def _vectors(method: str, data: FitData, options: FitOptions) -> Float[Tensor, "steps features"]:
    assert data.statistics.shape is not None
    steps = range(data.statistics.shape[0])
    return torch.stack([METHODS[method](data, step, options) for step in steps])


def _try_fit(method: str, data: FitData, options: FitOptions) -> Float[Tensor, "steps features"]:
    """The vectors, or NaN where half of the rows do not suffice for them."""
    assert data.statistics.shape is not None
    nothing = torch.full(data.statistics.shape, math.nan, dtype=torch.float64)
    if 0 in data.counts:
        return nothing
    try:
        return _vectors(method, data, options).cpu()
    except InvalidInput:
        return nothing


def _aucs(data: SiteData, directions: list[Tensor]) -> list[tuple[float, ...]]:
    """For each direction [steps, features], how it separates the rows kept out at each step."""
    stacked = torch.stack(directions)
    source, target = (torch.einsum("nsf,vsf->vsn", rows.double(), stacked) for rows in data.held)
    return [
        tuple(auc(a, b) for a, b in zip(*each, strict=True))
        for each in zip(source, target, strict=True)
    ]


def _scale(vectors: Tensor, norm: str, tokens: int | None) -> Tensor:
    """A vector without length keeps none."""
    if norm == "none":
        return vectors
    if norm == "tensor" and tokens is None:
        raise InvalidInput(
            "norm 'tensor' scales by the number of tokens, and rows of a language model have each "
            "their own; use 'channel' or 'none'"
        )
    length = vectors.norm(dim=1, keepdim=True)
    length = length * math.sqrt(tokens or 1) if norm == "tensor" else length
    return torch.where(length > 0, vectors / length, 0.0)


def _lay_out(vectors: Tensor, steps: tuple[int, ...]) -> Tensor:
    """[features], or a row for every step of the run up to the last that was recorded."""
    if not steps:
        return vectors[0]
    table = torch.zeros(max(steps) + 1, vectors.shape[1])
    table[list(steps)] = vectors
    return table
