"""Heat maps as colours, alone or over a picture."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dreamreader.report.blocks import to_pil


def apply_colours(heat: Float[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """The colours of a map, from black at 0 over purple and orange to white at its maximum.

    Formula: l + a (cos p v + sin p w), where the lightness l is the share of the maximum,
        a = 0.7 l (1 - l), p = 2 pi (0.1 + l / 3).

    Reference:
        Green, A colour scheme for the display of astronomical intensity images (2011).
    """
    light = (heat / heat.amax().clamp(min=1e-12))[..., None].double()
    angle = 2 * math.pi * (0.1 + light / 3)
    across = angle.cos() * light.new_tensor([-0.14861, -0.29227, 1.97294])
    along = angle.sin() * light.new_tensor([1.78277, -0.90649, 0.0])
    return (light + 0.7 * light * (1 - light) * (across + along)).clamp(0, 1).float()


def overlay(image: Any, heat: Float[Tensor, "h w"], strength: float) -> Any:
    """A picture with a map over it: the more attention, the more of the map's colour."""
    picture = to_pil(image).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(picture.height, picture.width, 3) / 255
    heat = resize(heat.float(), (picture.height, picture.width))
    share = (strength * heat / heat.amax().clamp(min=1e-12))[..., None]
    mixed = pixels * (1 - share) + apply_colours(heat) * share
    return Image.fromarray((mixed * 255).round().byte().numpy())


def resize(
    maps: Float[Tensor, "*axes h w"], size: tuple[int, int]
) -> Float[Tensor, "*axes height width"]:
    """Bicubic to a size (height, width), then clamped at 0."""
    if tuple(maps.shape[-2:]) == size:
        return maps.clamp(min=0)
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    found = F.interpolate(flat, size, mode="bicubic", align_corners=False)
    return found.clamp_(min=0).view(*maps.shape[:-2], *size)
