"""The methods of experiments, one file each, and the spec that one of them completes."""

from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dreamreader.experiments.job import Method, MethodSpec

METHODS = [
    "edit.EditMethod",
    "steer.SteerMethod",
    "reft.ReftMethod",
    "guide.GuideMethod",
    "patch.PatchMethod",
    "ablate.AblateMethod",
    "patch.WindowsMethod",
    "lens.LensMethod",
    "heatmap.HeatMapMethod",
    "sae.SaeMethod",
    "stitch.StitchMethod",
    "transfer.TransferMethod",
]
"""Module and class of each; a new method is one line here."""


def _load(home: str) -> type[Method]:
    module, _, name = home.partition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[reduce(or_, map(_load, METHODS)), Field(discriminator="kind")]


class ExperimentSpec(MethodSpec):
    """A whole experiment: subject, data, method, metrics."""

    method: AnyMethod  # pyright: ignore[reportIncompatibleVariableOverride]


Spec = ExperimentSpec  # its earlier name

__all__ = ["ExperimentSpec", "Method", "Spec"]
