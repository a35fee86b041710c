"""What the detector says about edited pictures, beside the unedited ones of the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dreamreader.metrics.detector import attributes, same_attributes
from dreamreader.stats import Interval, wilson
from dreamreader.zoo.detector import Found, Reading, detect


@dataclass(frozen=True)
class Outcome:
    """One truth value per picture.

    Attributes:
        turned: the main object has the target colour.
        source: it has the source colour.
        kept: shape and place of the main object are those of the unedited picture.
        rest: size, background, frame and number of objects are too.
    """

    turned: Sequence[bool]
    source: Sequence[bool]
    kept: Sequence[bool]
    rest: Sequence[bool]

    def share(self, name: str) -> Interval:
        return wilson(getattr(self, name))

    def __add__(self, other: "Outcome") -> "Outcome":
        """The outcome over the pictures of both."""
        names = ("turned", "source", "kept", "rest")
        return Outcome(*([*getattr(self, name), *getattr(other, name)] for name in names))

    def as_dict(self) -> dict[str, dict[str, float | int]]:
        return {name: self.share(name).as_dict() for name in ("turned", "source", "kept", "rest")}


def judge(
    images: Float[Tensor, "n 3 h w"], unedited: Sequence[Reading], source: str, target: str
) -> Outcome:
    """Reads edited pictures and compares them with the readings of the unedited ones.

    Args:
        images: edited pictures, values in [0, 1].
        unedited: one reading per picture, of the same prompt and seed without the edit.
        source, target: colours.

    Returns:
        The outcome; a picture without any object counts as neither turned nor kept.
    """
    pairs = [
        (attributes(now), attributes(before))
        for now, before in zip(detect(images), unedited, strict=True)
    ]
    return Outcome(
        turned=[now["color"] == target for now, _ in pairs],
        source=[now["color"] == source for now, _ in pairs],
        kept=[same_attributes(*each, ("shape", "place")) for each in pairs],
        rest=[same_attributes(*each, ("size", "background", "frame", "objects")) for each in pairs],
    )


def main(reading: Reading) -> Found | None:
    """The largest object, if there is any."""
    return reading.objects[0] if reading.objects else None
