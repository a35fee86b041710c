"""Checks of the options of methods of maps, before anything is recorded or fitted."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import Recipe
from dreamreader.mapping.checks import check_number, check_whole
from dreamreader.mapping.local import check_grid

# of maps that are trained, where an option says nothing else
RECIPE = Recipe(epochs=3, lr=1e-4, batch_size=64, validate_every=None)


def check_option(method: str, name: str, value: Any) -> Any:
    """The value of an option as a method takes it.

    Raises:
        InvalidInput, UnknownName: it cannot be right for any pairs.
    """
    return _CHECKS[name](method, value) if name in _CHECKS else value


def _check_lambdas(method: str, value: Any) -> list[float]:
    try:
        found = [check_number(method, each) for each in _listed(value)]
    except InvalidInput:
        found = []
    if not found or min(found) < 0:
        raise InvalidInput(f"{method}: lambdas are numbers from 0, one or several, got {value!r}")
    return found


def _check_rank(method: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    found = [check_whole(f"{method}: a rank", each, 1) for each in _listed(value)]
    if not found:
        raise InvalidInput(f"{method}: rank is a whole number from 1, or several, got {value!r}")
    return found


def _check_k(method: str, value: Any) -> int:
    k = check_whole(f"{method}: k", value, 1)
    if not k % 2:
        raise InvalidInput(
            f"{method}: k is odd and at least 1, got {k}; nearest: {k - 1} and {k + 1}"
        )
    return k


def _check_grid(method: str, value: Any) -> tuple[int, int] | None:
    return None if value is None else check_grid(value)


def _check_scale(method: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InvalidInput(
            f"{method}: scale is True or False, for whether s is fitted, got {value!r}"
        )
    return bool(value)


def _check_rcond(method: str, value: Any) -> float:
    found = check_number(f"{method}: rcond", value)
    if not 0 <= found < 1:
        raise InvalidInput(f"{method}: rcond is from 0 to below 1, got {value!r}")
    return found


def _check_recipe(method: str, value: Any) -> Recipe:
    """A recipe, or the usual one with some of its fields changed."""
    known = [each.name for each in fields(Recipe)]
    if isinstance(value, Recipe):
        return value
    if not isinstance(value, Mapping):
        raise InvalidInput(
            f"{method}: recipe is a fitting.Recipe or a mapping of {', '.join(known)}, got "
            f"{value!r}"
        )
    for name in value:
        if name not in known:
            raise UnknownName("field of a recipe", str(name), known)
    try:
        return replace(RECIPE, **value)
    except InvalidInput as error:
        raise InvalidInput(f"{method}: recipe: {error}") from error


def _check_folder(method: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise InvalidInput(f"{method}: folder is a path, got {value!r}")
    return value


def _check_share(method: str, value: Any) -> float:
    found = check_number("fit_map: share", value)
    if not 0 < found < 1:
        raise InvalidInput(f"fit_map: share is a number between 0 and 1, got {value!r}")
    return found


def _listed(value: Any) -> list[Any]:
    several = isinstance(value, Iterable) and getattr(value, "ndim", 1)
    return list(value) if several and not isinstance(value, str) else [value]  # pyright: ignore


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lambdas": _check_lambdas,
    "rank": _check_rank,
    "k": _check_k,
    "grid": _check_grid,
    "degree": lambda method, value: check_whole(f"{method}: degree", value, 0),
    "scale": _check_scale,
    "count": lambda method, value: check_whole(f"{method}: count", value, 1),
    "rcond": _check_rcond,
    "hidden": lambda method, value: (
        None if value is None else check_whole(f"{method}: hidden", value, 1)
    ),
    "recipe": _check_recipe,
    "folder": _check_folder,
    "share": _check_share,
    "seed": lambda method, value: check_whole("fit_map: seed", value),
}
