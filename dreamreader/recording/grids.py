"""Feature maps and patches of one picture on grids of different size."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName

RESAMPLINGS = ("area", "bilinear")


def resample_grid(
    values: Float[Tensor, "*axes tokens d"],
    grid: tuple[int, int],
    wanted: tuple[int, int],
    how: str = "area",
) -> Float[Tensor, "*axes places d"]:
    """Brings tokens of the picture from one grid to another, by their places in the picture.

    Args:
        values: tokens row by row. grid: their height and width. wanted: those of the result.
        how: where the wanted grid is coarser, the mean over the `area` of a place, or `bilinear`
            between the nearest places; where it is finer always bilinear.

    Returns:
        float32 at least; the values themselves where the grids are equal.

    Raises:
        InvalidInput: the grid is not that of the tokens, the pictures have another shape, or the
            values are not of floating point.
        UnknownName: there is no such resampling.

    Example:
        >>> resample_grid(torch.tensor([[1.0], [3.0], [5.0], [7.0]]), (2, 2), (1, 1))
        tensor([[4.]])
    """
    if how not in RESAMPLINGS:
        raise UnknownName("resampling of grids", how, RESAMPLINGS)
    if not values.is_floating_point():
        raise InvalidInput(f"values of a grid are of floating point, got {values.dtype}")
    (height, width), (new_height, new_width) = _check_grid(grid), _check_grid(wanted)
    if height * width != values.shape[-2]:
        raise InvalidInput(
            f"a grid of {height} x {width} has {height * width} tokens, got {values.shape[-2]}"
        )
    if height * new_width != new_height * width:
        raise InvalidInput(
            f"grids of {height} x {width} and of {new_height} x {new_width} are of pictures of "
            "another shape: their tokens have no common places"
        )
    if height == new_height:
        return values
    area = how == "area" and new_height < height
    mode = {"mode": "area" if area else "bilinear"}
    if mode["mode"] == "bilinear":
        mode |= {"align_corners": False}  # places are squares of the picture, not their middles
    wide = values if values.element_size() > 2 else values.float()
    maps = wide.reshape(-1, height, width, values.shape[-1]).permute(0, 3, 1, 2)
    if area and height % new_height:  # there torch's means are over places that overlap
        rows, columns = (
            _area_weights(old, new).to(maps)
            for old, new in ((height, new_height), (width, new_width))
        )
        found = rows @ maps @ columns.mT
    else:
        found = F.interpolate(maps, (new_height, new_width), **mode)  # pyright: ignore
    return found.permute(0, 2, 3, 1).reshape(*values.shape[:-2], -1, values.shape[-1])


def _check_grid(grid: Any) -> tuple[int, int]:
    """Height and width of a grid.

    Raises:
        InvalidInput: they are not two whole numbers from 1.
    """
    sides = tuple(grid) if isinstance(grid, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(each, int) and each > 0 for each in sides):
        raise InvalidInput(f"a grid is its (height, width), whole numbers from 1, got {grid!r}")
    return sides


def _area_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """The share of each place of a side in each of fewer places."""
    ends = torch.arange(new + 1, dtype=torch.float64) * old / new
    places = torch.arange(old, dtype=torch.float64)
    low = torch.maximum(ends[:-1, None], places)
    high = torch.minimum(ends[1:, None], places + 1)
    return (high - low).clamp(min=0) * new / old
