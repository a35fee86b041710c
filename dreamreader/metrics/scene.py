"""Whether a picture of the embedded world shows all that its caption says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics.base import Column, Outputs, require_field
from dreamreader.metrics.detector import VALUES, attributes
from dreamreader.zoo.detector import detect

ATTRIBUTES = (*VALUES, "frame")


@dataclass(frozen=True)
class SceneRight:
    """Whether the detector reads from each picture what its row says.

    Columns: `<attribute>_right`, and `scene_right`: there is one object, and all of them are.

    Args:
        attributes: that are compared, all by default; those that a caption leaves unsaid have no
            right value.
        column: what columns of the rows begin with, as in `source_color`.

    Raises:
        UnknownName: there is no such attribute.
        InvalidInput: at the rows, one has no such column.
    """

    attributes: Sequence[str] = ATTRIBUTES
    column: str = "source"

    name: ClassVar[str] = "scene"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.attributes, str) or not self.attributes:
            raise InvalidInput(f"scene: attributes are a list of some, got {self.attributes!r}")
        for each in self.attributes:
            if each not in ATTRIBUTES:
                raise UnknownName("attribute of scenes", str(each), ATTRIBUTES)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns that are truth values."""
        return (*(f"{name}_right" for name in self.attributes), "scene_right")

    def measure(self, got: Outputs, reference: Outputs | None = None) -> dict[str, Column]:
        found = [attributes(each) for each in detect(require_field(self.name, "images", got))]
        columns: dict[str, Column] = {}
        for name in self.attributes:
            wanted = self._wanted(got, name)
            columns[f"{name}_right"] = [
                each[name] == value for each, value in zip(found, wanted, strict=True)
            ]
        rights = zip(*columns.values(), strict=True)
        columns["scene_right"] = [
            each["objects"] == 1 and all(right) for each, right in zip(found, rights, strict=True)
        ]
        return columns

    def _wanted(self, got: Outputs, name: str) -> list[Any]:
        column = f"{self.column}_{name}"
        values = got.column(column)
        if None in values:
            raise InvalidInput(
                f"scene: row {values.index(None)} has no column {column!r}, which says what is "
                "right; give data: scenes, or such a column"
            )
        return [value == "yes" for value in values] if name == "frame" else values
