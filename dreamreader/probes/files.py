"""Probes in a safetensors file: weights as tensors, the card as JSON in the header's metadata."""

import os

import torch
from torch import Tensor

from dreamreader._tensor_files import load_described, save_described
from dreamreader.edits.mlp import Mlp
from dreamreader.probes.card import Card
from dreamreader.probes.labels import Task
from dreamreader.probes.probe import Probe

_KIND = "probe"


def save(path: str | os.PathLike[str], probe: Probe) -> None:
    """Writes a probe to a file that `load` reads back equal.

    `weight.0`, `bias.0`, ... are stacked over the perceptrons, [count, outputs, inputs]; `noise`
    and `temperature` beside them.
    """
    layers = zip(*(each.weights for each in probe.mlps), strict=True)
    tensors = {f"weight.{n}": torch.stack(each) for n, each in enumerate(layers)}
    layers = zip(*(each.biases for each in probe.mlps), strict=True)
    tensors |= {f"bias.{n}": torch.stack(each) for n, each in enumerate(layers)}
    tensors["temperature"] = probe.temperature
    noise = [each.noise for each in probe.mlps if each.noise is not None]
    if noise:
        tensors["noise"] = torch.stack(noise)
    content = {
        "card": probe.card.as_dict(),
        "activation": probe.mlps[0].activation,
        "steps": list(probe.steps),
        "loss": probe.loss,
    }
    save_described(path, _KIND, {n: t.cpu().contiguous() for n, t in tensors.items()}, content)


def load(path: str | os.PathLike[str]) -> Probe:
    """The probe of a file, on the CPU.

    Raises:
        InvalidInput: the file holds no probe, or is of another version.
    """
    content, tensors = load_described(path, _KIND)
    card = Card.of(content["card"])
    classes = {attribute: tuple(names) for attribute, names in card.classes.items()}
    task = Task(card.task, classes)
    depth = sum(name.startswith("weight.") for name in tensors)

    def mlp(number: int) -> Mlp:
        def layers(name: str) -> tuple[Tensor, ...]:
            return tuple(tensors[f"{name}.{n}"][number].clone() for n in range(depth))

        steps = (content["steps"][number],) if content["steps"] else None
        noise = tensors["noise"][number].clone() if "noise" in tensors else None
        return Mlp(
            layers("weight"), layers("bias"), content["activation"], task.labels, steps, noise
        )

    mlps = tuple(mlp(number) for number in range(len(tensors["weight.0"])))
    heat = tensors["temperature"]
    return Probe(mlps, task, content["loss"], heat, card.site, card.branch, card.pool, card)
