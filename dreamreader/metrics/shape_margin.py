"""How far a shape has gone from one to another."""

from dataclasses import dataclass
from typing import ClassVar

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics.base import Column, Outputs, require_field
from dreamreader.zoo import scenes
from dreamreader.zoo.detector import detect, shape_overlaps


@dataclass(frozen=True)
class ShapeMargin:
    """How much better the largest object fits the target shape than the source shape.

    `overlap(target) - overlap(source)`, soft intersections over union at the object's own place and
    area: below 0 at the source, above at the target. The detector's shape is a yes or no; this also
    sees half of an effect. None where the picture shows no object.

    Args:
        source, target: shapes; None: those of each row's columns `source` and `target`.
    """

    source: str | None = None
    target: str | None = None

    name: ClassVar[str] = "shape_margin"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for each in (self.source, self.target):
            if each is not None:
                _shape_values(each)
        if self.source is not None and self.source == self.target:
            raise InvalidInput(f"shape_margin: source and target are both {self.source}")

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        readings = detect(require_field(self.name, "images", got))
        sides = [self._shapes(got, name) for name in ("source", "target")]
        column: Column = []
        for reading, source, target in zip(readings, *sides, strict=True):
            if not reading.objects or source is None or target is None:
                column.append(None)
                continue
            overlaps = shape_overlaps(reading.objects[0].mask.float())
            column.append(overlaps[target] - overlaps[source])
        return {self.name: column}

    def _shapes(self, got: Outputs, name: str) -> list[str | None]:
        given = getattr(self, name)
        if given is not None:
            return [given] * len(got.rows)
        found = got.column(name)
        if all(each is None for each in found):
            raise InvalidInput(
                f"shape_margin: the rows have no column {name!r} with a shape; give the option "
                f"{name}"
            )
        return [None if each is None else _shape_values(each) for each in found]


def _shape_values(shape: str) -> str:
    if shape not in scenes.SHAPES:
        raise UnknownName("shape", str(shape), scenes.SHAPES)
    return shape
