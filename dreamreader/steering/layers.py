"""Directions as vectors by number of layer, for other tools."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import parse
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering.directions import Directions


def to_layers(
    directions: Mapping[str, Tensor], layers: Mapping[str, int] | None = None
) -> dict[int, Float[Tensor, " features"]]:
    """Vectors by number of layer, as tools for language models take them.

    Args:
        directions: [features] by site.
        layers: number of each site's layer; by default the one number in the site's path.

    Returns:
        float32 vectors by layer, in their order, on the CPU.

    Raises:
        InvalidInput: a site has one vector for each step, no number of its own in its path, or
            shares it with another.

    Example:
        >>> to_layers({"model.layers.12": torch.ones(2)})
        {12: tensor([1., 1.])}
    """
    found: dict[int, Tensor] = {}
    for site, vector in directions.items():
        if vector.dim() != 1:
            raise InvalidInput(
                f"{site}: {list(vector.shape)} holds a vector for each step, a layer takes one; "
                "fit with steps='shared'"
            )
        if layers is not None and site not in layers:
            raise UnknownName("site in layers", site, layers)
        number = _layer(site) if layers is None else layers[site]
        if number in found:
            raise InvalidInput(f"{site}: layer {number} has a direction already; give layers=")
        found[number] = vector.detach().cpu().float()
    return dict(sorted(found.items()))


def from_layers(
    vectors: Mapping[int, Any], site: str, *, source: str = "source", target: str = "target"
) -> Directions:
    """Directions from vectors by number of layer, such as those of repeng and steering-vectors.

    Args:
        vectors: a tensor or array [features] for each layer; negative numbers are refused, since
            what they stand for depends on the model.
        site: where each goes, with `{layer}` for the number: "model.layers.{layer}".
        source, target: names of what the vectors lead between.

    Returns:
        Directions in float32, used as given.

    Raises:
        InvalidInput: there is no vector or no `{layer}`, a number is negative, or a vector is not
            one finite row.
    """
    if "{layer}" not in site:
        raise InvalidInput(f"site {site!r} has no {{layer}} for the number of the layer")
    if not vectors:
        raise InvalidInput("there are no vectors")
    found: dict[str, Tensor] = {}
    for layer, value in vectors.items():
        vector = torch.as_tensor(value).float().flatten()
        if int(layer) < 0 or torch.as_tensor(value).squeeze().dim() != 1:
            shape = list(torch.as_tensor(value).shape)
            raise InvalidInput(
                f"layer {layer}: a number from 0 and one row are needed, got {shape}"
            )
        if not bool(vector.isfinite().all()):
            raise InvalidInput(f"layer {layer}: the vector is not finite")
        name = site.replace("{layer}", str(layer))
        parse(name)
        found[name] = vector
    return Directions(found, source, target, "given", "none")


def _layer(site: str) -> int:
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", "." + parse(site).path)
    if len(numbers) != 1:
        raise InvalidInput(
            f"{site}: the path has {len(numbers)} numbers, so its layer is unknown; give layers="
        )
    return int(numbers[0])
