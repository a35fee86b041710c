"""The methods of experiments, one file each, and the spec that one of them completes."""

from typing import Annotated

from pydantic import Field

from dreamreader.experiments.job import Method, MethodSpec
from dreamreader.experiments.methods.ablate import AblateMethod
from dreamreader.experiments.methods.edit import EditMethod
from dreamreader.experiments.methods.guide import GuideMethod
from dreamreader.experiments.methods.heatmap import HeatMapMethod
from dreamreader.experiments.methods.lens import LensMethod
from dreamreader.experiments.methods.patch import PatchMethod, WindowsMethod
from dreamreader.experiments.methods.reft import ReftMethod
from dreamreader.experiments.methods.steer import SteerMethod

AnyMethod = Annotated[
    EditMethod
    | SteerMethod
    | ReftMethod
    | GuideMethod
    | PatchMethod
    | AblateMethod
    | WindowsMethod
    | LensMethod
    | HeatMapMethod,
    Field(discriminator="kind"),
]


class ExperimentSpec(MethodSpec):
    """A whole experiment: subject, data, method, metrics."""

    method: AnyMethod  # pyright: ignore[reportIncompatibleVariableOverride]


Spec = ExperimentSpec  # its earlier name

__all__ = ["ExperimentSpec", "Method", "Spec"]
