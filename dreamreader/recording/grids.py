"""Feature maps and patches of one picture on grids of different size."""

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
        InvalidInput: the grid is not that of the tokens, or the pictures have another shape.
        UnknownName: there is no such resampling.

    Example:
        >>> resample_grid(torch.tensor([[1.0], [3.0], [5.0], [7.0]]), (2, 2), (1, 1))
        tensor([[4.]])
    """
    if how not in RESAMPLINGS:
        raise UnknownName("resampling of grids", how, RESAMPLINGS)
    (height, width), (new_height, new_width) = grid, wanted
    if height * width != values.shape[-2]:
        raise InvalidInput(
            f"a grid of {height} x {width} has {height * width} tokens, got {values.shape[-2]}"
        )
    if height * new_width != new_height * width:
        raise InvalidInput(
            f"grids of {height} x {width} and of {new_height} x {new_width} are of pictures of "
            "another shape: their tokens have no common places"
        )
    if grid == wanted:
        return values
    coarser = new_height < height
    mode = {"mode": "area"} if coarser and how == "area" else {"mode": "bilinear"}
    if mode["mode"] == "bilinear":
        mode |= {"align_corners": False}  # places are squares of the picture, not their middles
    wide = values if values.element_size() > 2 else values.float()
    maps = wide.reshape(-1, height, width, values.shape[-1]).permute(0, 3, 1, 2)
    found = F.interpolate(maps, wanted, **mode)  # pyright: ignore
    return found.permute(0, 2, 3, 1).reshape(*values.shape[:-2], -1, values.shape[-1])
