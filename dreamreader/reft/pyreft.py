"""Adapters from checkpoints of pyreft."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.reft.model import Reft

_BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")
_PARTS = {
    "block_output": ("", ""),
    "block_input": ("", ":in"),
    "mlp_output": ("mlp", ""),
    "mlp_input": ("mlp", ":in"),
    "attention_output": ("self_attn|attn", ""),
    "attention_input": ("self_attn|attn", ":in"),
    "attention_value_output": ("self_attn.o_proj|attn.c_proj", ":in"),
}
_CLASSES = {
    "LoreftIntervention": "loreft",
    "DireftIntervention": "direft",
    "NoreftIntervention": "noreft",
}


def from_pyreft(folder: str | os.PathLike[str], reader: Reader, *, tokens: Any = None) -> Reft:
    """Reads a folder that `ReftModel.save` of pyreft 0.1 wrote.

    The variants are told by config.json, the rotation comes from its Householder form where the
    file holds that. Nothing is unpickled but tensors.

    Args:
        folder: with config.json and one intkey_*.bin for each intervention.
        reader: of the language model that they were trained on.
        tokens: the positions that were trained, which pyreft does not save: its "f1+l1" is [0, -1].

    Returns:
        Adapters on the CPU, float32. An activation function on W h + b, which pyreft does not save
        either, is taken to be none.

    Raises:
        InvalidInput: a file is missing or holds something else, the interventions are of several
            kinds or of one that is not known, or two are at one site.
        UnknownName: the model has no such site.
    """
    home = Path(folder)
    config = _config(home)
    places = [each[:4] for each in config["representations"]]
    kinds = [each.split(".")[-1].rstrip("'>") for each in config["intervention_types"]]
    unknown = [each for each in kinds if each not in _CLASSES]
    if unknown or len(set(kinds)) != 1:
        raise InvalidInput(
            f"{home}: interventions are {', '.join(sorted(set(kinds)))}; one kind of "
            f"{', '.join(_CLASSES)} can be read"
        )
    variant = _CLASSES[kinds[0]]
    found: dict[str, dict[str, Tensor]] = {}
    for layer, component, unit, number in places:
        site = _site(reader, int(layer), component)
        if site in found:
            raise InvalidInput(f"{home}: two interventions are at {site}, one can be read")
        path = home / f"intkey_{_key(layer, component, unit, number)}.bin"
        found[site] = _parameters(path, variant)
    return _make(found, variant, tokens, reader)


def _make(
    found: Mapping[str, dict[str, Tensor]], variant: str, tokens: Any, reader: Reader
) -> Reft:
    widths = {site: each["weight"].shape[-1] for site, each in found.items()}
    ranks = {site: each["weight"].shape[-2] for site, each in found.items()}
    reft = Reft(widths, ranks, variant, tokens=tokens)
    with torch.no_grad():
        for site, adapter in reft.adapters.items():
            for name, value in adapter.named_parameters():
                value.copy_(found[site][name])
    reft.check(reader)
    return reft


def _config(home: Path) -> dict[str, Any]:
    path = home / "config.json"
    if not path.is_file():
        raise InvalidInput(
            f"{home} has no config.json, which says where interventions are and of which kind; "
            "save with ReftModel.save"
        )
    config = json.loads(path.read_text())
    if "representations" not in config or "intervention_types" not in config:
        raise InvalidInput(f"{path} is no configuration of pyreft")
    return config


def _key(layer: int, component: str, unit: str, number: int) -> str:
    """pyreft's name of an intervention; dots in a component stand for a path."""
    tail = f"unit_{unit}_nunit_{number}#0"
    if "." in component:
        return f"comp_{component.replace('.', '_')}_{tail}"
    return f"layer_{layer}_comp_{component}_{tail}"


def _site(reader: Reader, layer: int, component: str) -> str:
    if "." in component:
        path, _, end = component.rpartition(".")
        site = path.replace("[", ".").replace("]", "") + {"input": ":in"}.get(end, "")
        return reader.sites(site).names[0]
    if component not in _PARTS:
        raise InvalidInput(
            f"component {component!r} is not known; known are {', '.join(_PARTS)} and paths"
        )
    modules = reader.modules
    names, port = _PARTS[component]
    for block in _BLOCKS:
        for name in names.split("|"):
            path = f"{block}.{layer}" + (f".{name}" if name else "")
            if path in modules:
                return path + port
    raise InvalidInput(f"{reader.name} has no layer {layer} with {component}")


def _parameters(path: Path, variant: str) -> dict[str, Tensor]:
    """Parameters of an adapter [1, ...] from a file of one intervention."""
    if not path.is_file():
        raise InvalidInput(f"{path.name} is missing in {path.parent}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        values = {name: each.float() for name, each in stored.items()}
        made = _READ[variant](values)
    except (pickle.UnpicklingError, RuntimeError, KeyError, AttributeError) as error:
        raise InvalidInput(
            f"{path} holds no intervention of the kind {variant}: {error}"
        ) from error
    return {name: each.unsqueeze(0) for name, each in made.items()}


def _loreft(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"rotation": v["rotate_layer"].T, "weight": v["weight"], "bias": v["bias"]}


def _direft(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
    form = "rotate_layer.parametrizations.weight"
    rotation = householder(v[f"{form}.original"], v[f"{form}.0.base"]).T
    return {"rotation": rotation, **_source(v)}


def _noreft(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
    source = _source(v)
    if "proj_layer.bias" in v:
        source["bias"] = source["bias"] - v["proj_layer.bias"]
    return {"projection": v["proj_layer.weight"], **source}


def _source(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": v["learned_source.weight"], "bias": v["learned_source.bias"]}


_READ = {"loreft": _loreft, "direft": _direft, "noreft": _noreft}


def householder(
    x: Float[Tensor, "width rank"], base: Float[Tensor, "width width"]
) -> Float[Tensor, "width rank"]:
    """Orthonormal columns from the stored form of torch's orthogonal parametrisation.

    Formula: B Q D with Q the product of the reflections I - tau a a' of the columns a of X below
    its diagonal (with 1 there), tau = 2 / |a|^2, and D the signs on the diagonal of X.
    """
    below = x.tril(-1)
    tau = 2 / (1 + below.square().sum(0))
    return base @ (torch.linalg.householder_product(below, tau) * x.diagonal().int())
