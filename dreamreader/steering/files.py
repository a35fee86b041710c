"""Directions in a safetensors file, and as vectors by layer for other tools.

A file holds one tensor for each site, named by the site, and in the metadata of its header, under
the key `dreamreader.directions`, JSON with labels, method, norm and evidence.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._tensor_files import load_described, save_described
from dreamreader.engine import parse
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering.directions import Directions
from dreamreader.steering.evidence import Evidence

_KIND = "directions"
_NAMES = ("source", "target", "method", "norm")


def save(path: str | os.PathLike[str], directions: Directions) -> None:
    """Writes directions to a file that `load` reads back equal.

    Args:
        path: of the file, usually with the ending .safetensors; an existing file is replaced.
        directions: what to write.
    """
    content = {
        **{name: getattr(directions, name) for name in _NAMES},
        "evidence": {site: _plain(each) for site, each in directions.evidence.items()},
        "sites": list(directions),
    }
    tensors = {site: each.detach().cpu().clone() for site, each in directions.items()}
    save_described(path, _KIND, tensors, content)


def load(path: str | os.PathLike[str]) -> Directions:
    """The directions of a file; tensors are on the CPU.

    Raises:
        InvalidInput: the file holds no directions, or is of another version.
    """
    content, tensors = load_described(path, _KIND)
    return Directions(
        {site: tensors[site] for site in content["sites"]},
        *(content[each] for each in _NAMES),
        evidence={site: _evidence(each) for site, each in content["evidence"].items()},
    )


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


def _plain(evidence: Evidence) -> dict[str, Any]:
    """Numbers as JSON has them, null for NaN."""

    def value(each: float) -> float | None:
        return None if each != each else each

    return {name: [value(each) for each in found] for name, found in asdict(evidence).items()}


def _evidence(content: Mapping[str, Any]) -> Evidence:
    values: dict[str, Any] = {
        each.name: tuple(float("nan") if value is None else value for value in content[each.name])
        for each in fields(Evidence)
    }
    return Evidence(**values)
