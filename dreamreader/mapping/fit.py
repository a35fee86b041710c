"""One call for every way to fit a map."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping.base import ActivationMap
from dreamreader.mapping.expanded import fit_local, fit_noise, fit_steps
from dreamreader.mapping.gradient import fit_affine, fit_mlp
from dreamreader.mapping.linear import (
    fit_anchors,
    fit_identity,
    fit_mean,
    fit_procrustes,
    fit_reduced_rank,
    fit_ridge,
)
from dreamreader.mapping.options import check_option
from dreamreader.mapping.problem import Data, MapProblem
from dreamreader.mapping.rows import PairedRows

_FITS: dict[str, Callable[..., ActivationMap]] = {
    "identity": fit_identity,
    "mean": fit_mean,
    "procrustes": fit_procrustes,
    "ridge": fit_ridge,
    "reduced_rank": fit_reduced_rank,
    "anchors": fit_anchors,
    "local": fit_local,
    "noise": fit_noise,
    "affine": fit_affine,
    "mlp": fit_mlp,
}
METHODS = (*_FITS, "steps")
BY_GRADIENT = ("affine", "mlp")


@torch.inference_mode(False)
@torch.no_grad()
def fit_map(
    data: Data,
    method: str = "ridge",
    *,
    validation: Data | None = None,
    share: float = 0.2,
    seed: int = 0,
    source_model: str | None = None,
    target_model: str | None = None,
    **options: Any,
) -> ActivationMap:
    """Fits a map from the source's side of pairs to the target's.

    Args:
        data: pairs; or their moments, which all of closed form but `anchors`, `local`, `noise` and
            `steps` need nothing besides.
        method: `identity` (cut or padded), `mean` (a control), `procrustes`, `ridge`,
            `reduced_rank`, `anchors`; `local` on a grid, `noise` for all noise levels, `steps`
            with another method for `each`; by gradients `affine` and `mlp`.
        validation: pairs or moments to choose by, where a method chooses; by default a `share` of
            the groups of the pairs, drawn by `seed`, which is not fitted to then.
        source_model, target_model: names for the card.
        options: of the method, see `fit_ridge` and its like.

    Returns:
        The map, on the CPU; its card has the settings that were chosen.

    Raises:
        UnknownName: there is no such method or option.
        InvalidInput: the pairs do not determine the map, or a value cannot be right.

    Example:
        >>> x = torch.randn(200, 4)
        >>> y = x @ torch.randn(4, 6) + 1
        >>> found = fit_map(PairedRows(x, y), "ridge")
        >>> torch.allclose(found.apply(x), y, atol=1e-3)
        True
    """
    options = check_options(method, {**options, "share": share, "seed": seed})
    each, share, seed = options.pop("each", method), options.pop("share"), options["seed"]
    own = _FITS[each]
    if "seed" not in _names(own):
        del options["seed"]
    if not isinstance(data, PairedRows) and method == "steps":
        raise InvalidInput("steps: it needs pairs of rows, not their moments")
    problem = MapProblem(data, validation, share, seed, each)
    made = (
        fit_steps(problem, own, each=each, **options)
        if method == "steps"
        else own(problem, **options)
    )
    card = replace(made.card, method=method, source_model=source_model, target_model=target_model)
    if isinstance(data, PairedRows):
        card = replace(card, source_site=data.source_site, target_site=data.target_site)
    return replace(made, card=card)


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method as it takes them: what `fit_map` refuses whatever the pairs are.

    Args:
        options: those of the method, `each` of `steps`, and `share` and `seed` of `fit_map`.

    Raises:
        UnknownName: there is no such method or option; says the nearest.
        InvalidInput: a value cannot be right.

    Example:
        >>> check_options("steps", {"lambdas": 0.1})
        {'each': 'ridge', 'lambdas': [0.1]}
    """
    if method not in METHODS:
        raise UnknownName("method of maps", str(method), METHODS)
    found = dict(options)
    each = str(found.pop("each", "ridge")) if method == "steps" else method
    if each not in _FITS:
        raise UnknownName("method of maps", each, _FITS)
    known = _names(_FITS[each])
    for name in found:
        if name not in (*known, "share", "seed"):
            also = ["each"] if method == "steps" else []
            raise UnknownName(f"option of {each}", str(name), known + also)
    checked = {name: check_option(each, name, value) for name, value in found.items()}
    return {"each": each, **checked} if method == "steps" else checked


def _names(fit: Callable[..., ActivationMap]) -> list[str]:
    """Of its options."""
    return [name for name in inspect.signature(fit).parameters if name != "problem"]
