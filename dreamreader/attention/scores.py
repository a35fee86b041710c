"""How well heat maps find objects: overlap and pointing with masks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.errors import InvalidInput


def iou(
    maps: Float[Tensor, "rows words *axes h w"],
    masks: Bool[Tensor, "rows h w"],
    threshold: float | str = 0.4,
) -> Float[Tensor, "rows words *axes"]:
    """Overlap of binarised maps with masks: |map and mask| / |map or mask|.

    Args:
        maps: heat maps of the masks' size. masks: where the object is.
        threshold: share of a map's own maximum from which on a pixel counts; or `"area"`: as many
            of the highest pixels as the mask has, so that nothing has to be tuned.

    Returns:
        Values in [0, 1]; NaN where a mask is empty or a map is NaN.

    Raises:
        InvalidInput: sizes that do not fit, or another threshold.
    """
    masks = _expand_masks(maps, masks)
    known = masks.flatten(-2).any(-1) & maps.flatten(-2).isfinite().all(-1)
    binary = _binary(maps, masks, threshold)
    both = (binary & masks).flatten(-2).sum(-1)
    either = (binary | masks).flatten(-2).sum(-1)
    return torch.where(known, both / either.clamp(min=1), torch.nan)


def pointing(
    maps: Float[Tensor, "rows words *axes h w"], masks: Bool[Tensor, "rows h w"]
) -> Float[Tensor, "rows words *axes"]:
    """Whether the highest pixel of each map lies in the mask: 1 or 0.

    Returns:
        NaN where a mask is empty or a map is NaN.

    Raises:
        InvalidInput: sizes that do not fit.
    """
    masks = _expand_masks(maps, masks).expand(maps.shape).flatten(-2)
    flat = maps.flatten(-2)
    hit = masks.gather(-1, flat.argmax(-1, keepdim=True)).squeeze(-1)
    known = masks.any(-1) & flat.isfinite().all(-1)
    return torch.where(known, hit.float(), torch.nan)


def _binary(maps: Tensor, masks: Tensor, threshold: float | str) -> Tensor:
    flat = maps.flatten(-2)
    if threshold == "area":
        count = masks.flatten(-2).sum(-1, keepdim=True).expand(*flat.shape[:-1], 1)
        order = torch.sort(flat, dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order)
        places = torch.arange(flat.shape[-1], device=flat.device).expand_as(order)
        rank.scatter_(-1, order, places)
        return (rank < count).view(maps.shape)
    if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise InvalidInput(f"threshold must be 'area' or in (0, 1], got {threshold!r}")
    return maps >= threshold * flat.amax(-1)[..., None, None]


def _expand_masks(maps: Tensor, masks: Tensor) -> Tensor:
    """Masks with the axes of the maps in between."""
    if masks.dtype != torch.bool or masks.dim() != 3:
        kind = str(masks.dtype).removeprefix("torch.")
        raise InvalidInput(f"masks must be bool [rows, h, w], got {kind} {list(masks.shape)}")
    if masks.shape[0] != maps.shape[0] or masks.shape[1:] != maps.shape[-2:]:
        raise InvalidInput(f"masks are {list(masks.shape)}, the maps {list(maps.shape)}")
    middle = (1,) * (maps.dim() - 3)
    return masks.to(maps.device).view(masks.shape[0], *middle, *masks.shape[1:])
