"""Adapters in one safetensors file: parameters as tensors, sites and shapes as JSON."""

import os

import torch

from dreamreader._tensor_files import load_described, save_described
from dreamreader.errors import InvalidInput
from dreamreader.reft.model import Reft

_KIND = "reft"


def save(path: str | os.PathLike[str], reft: Reft) -> None:
    """Writes a file that `load` reads back equal.

    Raises:
        InvalidInput: the tokens are no numbers, slice or word.
    """
    adapters = list(reft.adapters.values())
    content = {
        "variant": reft.variant,
        "steps": reft.steps,
        "tokens": _packed(reft.tokens),
        "model_parameters": reft.of,
        "sites": [{"site": a.site, "width": a.width, "rank": a.rank} for a in adapters],
    }
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, adapter in enumerate(adapters)
        for name, value in adapter.named_parameters()
    }
    save_described(path, _KIND, tensors, content)


def load(path: str | os.PathLike[str]) -> Reft:
    """The adapters of a file, on the CPU.

    Raises:
        InvalidInput: the file holds no adapters, a part of them, or is of another version.
    """
    content, tensors = load_described(path, _KIND)
    sites = content["sites"]
    reft = Reft(
        {each["site"]: each["width"] for each in sites},
        {each["site"]: each["rank"] for each in sites},
        content["variant"],
        steps=content["steps"],
        tokens=_unpacked(content["tokens"]),
    )
    reft.of = content["model_parameters"]
    for number, adapter in enumerate(reft.adapters.values()):
        for name, value in adapter.named_parameters():
            stored = tensors.get(f"{number}.{name}")
            if stored is None or stored.shape != value.shape:
                got = "nothing" if stored is None else str(list(stored.shape))
                raise InvalidInput(
                    f"{os.fspath(path)}: {name} of {adapter.site} must be {list(value.shape)}, got "
                    f"{got}"
                )
            with torch.no_grad():
                value.copy_(stored)
    return reft


def _packed(tokens: object) -> object:
    """JSON of a selection of tokens."""
    if tokens is None or isinstance(tokens, int | str):
        return tokens
    if isinstance(tokens, slice):
        return {"slice": [tokens.start, tokens.stop, tokens.step]}
    if isinstance(tokens, list | tuple | range) and all(isinstance(each, int) for each in tokens):
        return list(tokens)
    raise InvalidInput(f"tokens={tokens!r} cannot be saved; give numbers, a slice or a word")


def _unpacked(tokens: object) -> object:
    return slice(*tokens["slice"]) if isinstance(tokens, dict) else tokens
