"""Perceptual distance (LPIPS) with weights from local files only."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics.base import Column, Outputs, pairs

NETS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""Networks, and what torchvision calls them."""


@dataclass(frozen=True)
class Lpips:
    """Learned perceptual image patch similarity to the reference; 0 for equal pictures.

    The package `lpips` brings the weights of its linear heads; those of the network below are a
    file of torchvision's, which this metric never fetches.

    Args:
        weights: torchvision's checkpoint of the network on ImageNet, such as
            alexnet-owt-7be5be79.pth; read as plain tensors.
        net: alex, vgg or squeeze.

    Raises:
        InvalidInput: the package or the file is missing, or it is of another network.
        UnknownName: there is no such network.

    Reference:
        Zhang et al. (2018), The Unreasonable Effectiveness of Deep Features as a Perceptual Metric.
    """

    weights: str
    net: str = "alex"

    name: ClassVar[str] = "lpips"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.net not in NETS:
            raise UnknownName("network of lpips", str(self.net), NETS)
        if find_spec("lpips") is None:
            raise InvalidInput(
                "lpips: the package lpips is not installed; `pip install lpips` brings it"
            )
        if not Path(self.weights).is_file():
            raise InvalidInput(
                f"lpips: there is no file {self.weights}; save torchvision's ImageNet weights of "
                f"{NETS[self.net]} there, nothing is downloaded"
            )

    @torch.inference_mode()
    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        a, b = pairs(self.name, "images", got, reference)
        measure = self._network
        values: Column = []
        for x, y in zip(a, b, strict=True):  # row by row: the result must not depend on the batch
            x, y = (each.detach().float().cpu()[None] * 2 - 1 for each in (x, y))
            values.append(float(measure(x, y)))
        return {self.name: values}

    @cached_property
    def _network(self) -> Any:
        package = import_module("lpips")  # this module has the same name
        network = package.LPIPS(net=self.net, pretrained=True, pnet_rand=True, verbose=False)
        given = torch.load(self.weights, map_location="cpu", weights_only=True)
        own = network.net.state_dict()
        # its slices keep the numbers of torchvision's layers: slice2.3.weight is features.3.weight
        names = {name: f"features.{name.partition('.')[2]}" for name in own}
        missing = [name for name in names.values() if name not in given]
        if missing:
            raise InvalidInput(
                f"lpips: {self.weights} has no {missing[0]}, so it is not of {NETS[self.net]}"
            )
        network.net.load_state_dict({name: given[source] for name, source in names.items()})
        return network.eval()
