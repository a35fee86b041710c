"""What the detector of the embedded world reads from each picture."""

from dataclasses import dataclass
from typing import Any, ClassVar

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics.base import Column, Outputs, require_field
from dreamreader.zoo import scenes
from dreamreader.zoo.detector import Reading, detect

VALUES = {
    "color": tuple(scenes.COLORS),
    "shape": scenes.SHAPES,
    "size": tuple(scenes.SIZES),
    "place": tuple(f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS),
    "background": tuple(scenes.BACKGROUNDS),
}
"""Attributes and the values they can have; no value belongs to two."""

_FRAME = {"no": False, "yes": True}

_GROUPS = {
    "color_kept": ("color",),
    "shape_kept": ("shape",),
    "place_kept": ("place",),
    "rest_kept": ("size", "background", "frame", "objects"),
}


@dataclass(frozen=True)
class Detector:
    """Attributes of the largest object and of the picture, and which of them an edit changed.

    Columns: `color`, `shape`, `size`, `place` of the largest object (None without one),
    `background`, `frame`, `objects` (their number). `turned`: the attribute that the row's target
    belongs to has this value; None where a row has no target. Beside a reference also
    `others_kept` (all that the target does not name), `color_kept`, `shape_kept`, `place_kept` and
    `rest_kept` (size, background, frame, number of objects), False where one of the two pictures
    has no object.

    Args:
        target: column of the rows with the wanted value, such as "blue" or "star", "yes" or "no"
            for the frame; several, such as "blue + white", must all be there.
        kept: whether to compare with the reference.

    Reference:
        `dreamreader.zoo.detector`.
    """

    target: str = "target"
    kept: bool = True

    name: ClassVar[str] = "detector"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not isinstance(self.kept, bool):
            raise InvalidInput(
                f"detector: target is the name of a column and kept true or false, got "
                f"{self.target!r} and {self.kept!r}"
            )

    @property
    def compares(self) -> bool:
        return self.kept

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns that are numbers or truth values."""
        kept = ("others_kept", *_GROUPS) if self.kept else ()
        return ("frame", "objects", "turned", *kept)

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, Column]:
        found = [attributes(each) for each in detect(require_field(self.name, "images", got))]
        columns: dict[str, Column] = {
            name: [each[name] for each in found] for name in (*VALUES, "frame", "objects")
        }
        targets = got.column(self.target)
        columns["turned"] = [_turn(each, t) for each, t in zip(found, targets, strict=True)]
        if self.kept:
            before = detect(require_field(self.name, "images", reference))
            pairs = list(zip(found, map(attributes, before), strict=True))
            columns["others_kept"] = [
                same_attributes(a, b, _others(t)) for (a, b), t in zip(pairs, targets, strict=True)
            ]
            for name, group in _GROUPS.items():
                columns[name] = [same_attributes(a, b, group) for a, b in pairs]
        return columns


def attributes(reading: Reading) -> dict[str, Any]:
    """Attributes of the largest object and of the whole picture."""
    main = reading.objects[0] if reading.objects else None
    own = {name: getattr(main, name, None) for name in ("color", "shape", "size")}
    return {
        **own,
        "place": None if main is None else f"{main.row} {main.column}",
        "background": reading.background,
        "frame": reading.frame,
        "objects": len(reading.objects),
    }


def _turn(found: dict[str, Any], target: Any) -> bool | None:
    if target is None:
        return None
    return all(found[name] == value for name, value in target_values(target).items())


def _others(target: Any) -> tuple[str, ...]:
    """The attributes that a target does not name."""
    named = {} if target is None else target_values(target)
    return tuple(name for name in (*VALUES, "frame", "objects") if name not in named)


def target_values(target: Any) -> dict[str, Any]:
    """Attributes and values that a target such as "blue + white" names.

    Raises:
        UnknownName: no attribute has such a value.
    """
    found: dict[str, Any] = {}
    for value in str(target).split(" + "):
        if value in _FRAME:
            found["frame"] = _FRAME[value]
            continue
        name = next((name for name, values in VALUES.items() if value in values), None)
        if name is None:
            every = [v for values in (*VALUES.values(), _FRAME) for v in values]
            raise UnknownName("target", value, every)
        found[name] = value
    return found


def same_attributes(a: dict[str, Any], b: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether both pictures have an object, and equal values of these attributes."""
    there = bool(a["objects"]) and bool(b["objects"])
    return there and all(a[name] == b[name] for name in names)
