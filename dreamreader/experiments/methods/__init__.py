"""The methods of experiments, one file each, and the spec that one of them completes."""

from typing import Annotated

from pydantic import Field

from dreamreader.experiments.methods.ablate import Ablate
from dreamreader.experiments.methods.base import Method
from dreamreader.experiments.methods.edit import Edit
from dreamreader.experiments.methods.guide import Guide
from dreamreader.experiments.methods.heatmap import HeatMap
from dreamreader.experiments.methods.lens import Lens
from dreamreader.experiments.methods.patch import Patch, Windows
from dreamreader.experiments.methods.reft import Reft
from dreamreader.experiments.methods.steer import Steer
from dreamreader.experiments.spec import Common

AnyMethod = Annotated[
    Edit | Steer | Reft | Guide | Patch | Ablate | Windows | Lens | HeatMap,
    Field(discriminator="kind"),
]


class Spec(Common):
    """A whole experiment: subject, data, method, metrics."""

    method: AnyMethod


__all__ = ["Method", "Spec"]
