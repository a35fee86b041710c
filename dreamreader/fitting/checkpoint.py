"""State of a training in one file, equal to the bit when read back."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from dreamreader.artifacts import Artifact, pack, unpack


class TrainingState(dict[str, Any], Artifact, kind="training", version=2):
    """Nested dictionaries, lists, numbers and tensors: all that a training needs to go on."""

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        return tensors, {"state": pack(dict(self), tensors)}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        # copies, as sums depend on where in memory a tensor begins
        copies = {name: each.clone() for name, each in tensors.items()}
        return cls(unpack(content["state"], copies))
