"""Fitting directions from recordings that are at hand."""

from collections.abc import Hashable, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from dreamreader.steering.directions import Directions
from dreamreader.steering.fitter import Fitter
from dreamreader.steering.methods import NEEDS, check_method
from dreamreader.steering.rows import Recorded


def fit(
    recorded: Recorded,
    labels: Sequence[str] | Int[Tensor, " rows"],
    source: str,
    target: str,
    method: str = "mean",
    *,
    groups: Sequence[Hashable] | None = None,
    steps: str = "each",
    holdout: int = 4,
    seed: int = 0,
    **options: Any,
) -> Directions:
    """Fits directions between two labels of recorded rows.

    Args:
        recorded, labels, groups: as in `Fitter.add`.
        source, target: labels; the directions lead from the one to the other.
        method: `mean`, `caa`, `pca`, `lda` or `logistic`, see `Fitter.fit`.
        steps: `each` or `shared`. holdout: one row of so many is kept out. seed: of the split.
        options: `norm`, `shrinkage` and `l2`, as in `Fitter.fit`.

    Returns:
        Directions with their evidence.

    Raises:
        UnknownName, InvalidInput: as `Fitter.add` and `Fitter.fit`.

    Example:
        >>> rows = {"0": torch.tensor([[0.0, 1.0], [2.0, 1.0]] * 8)}
        >>> fit(rows, ["red", "blue"] * 8, "red", "blue", "caa")["0"].tolist()
        [1.0, 0.0]
    """
    fitter = _fitter(method, steps, holdout, seed)
    fitter.add(recorded, labels, groups)
    return fitter.fit(source, target, method, **options)


def fit_pairs(
    source: Recorded,
    target: Recorded,
    method: str = "mean",
    *,
    labels: tuple[str, str] = ("source", "target"),
    steps: str = "each",
    holdout: int = 4,
    seed: int = 0,
    **options: Any,
) -> Directions:
    """Fits directions from pairs: row i of the target is row i of the source, changed.

    Args:
        source, target: recordings of the same sites, with as many rows.
        method, steps, holdout, seed, options: as in `fit`; `pca` finds the direction in which pairs
            differ most.
        labels: names of both.

    Returns:
        Directions with their evidence.

    Raises:
        UnknownName, InvalidInput: as `Fitter.add_pairs` and `Fitter.fit`.
    """
    fitter = _fitter(method, steps, holdout, seed)
    fitter.add_pairs(source, target, labels)
    return fitter.fit(*labels, method, **options)


def _fitter(method: str, steps: str, holdout: int, seed: int) -> Fitter:
    check_method(method)
    keep = "rows" if method in NEEDS else "moments"
    return Fitter(steps=steps, keep=keep, holdout=holdout, seed=seed)
