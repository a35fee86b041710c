"""What a map is fitted to: pairs or their moments, and what is held out to choose by."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.moments import CrossMoments
from dreamreader.mapping.rows import PairedRows

Data = PairedRows | CrossMoments

# what is valid with fewer pairs than the source has dimensions
FEW = (
    "ridge and reduced_rank with every lambda above 0, mean, identity, anchors, and affine and "
    "mlp, whose gradients are stopped early"
)


@dataclass(eq=False)
class MapProblem:
    """Pairs to fit to, and pairs to choose by.

    Attributes:
        train: pairs, or their moments. held_out: the same; drawn from the pairs where None.
        share, seed: of that draw.
        what: in errors, the method.
        chosen: which sequences of `train` are held out, where they were drawn from it: nothing is
            copied for that.
    """

    train: Data
    held_out: Data | None = None
    share: float = 0.2
    seed: int = 0
    what: str = "map"
    chosen: Bool[Tensor, " sequences"] | None = None

    def __post_init__(self):
        for data in (self.train, self.held_out):
            if data is not None:
                check_data(self.what, data)
        if self.held_out is not None and _widths(self.held_out) != _widths(self.train):
            raise InvalidInput(
                "{}: it is fitted to pairs of {} -> {} features, held out are {} -> {}".format(
                    self.what, *_widths(self.train), *_widths(self.held_out)
                )
            )

    def split(self) -> "MapProblem":
        """With pairs that are held out.

        Raises:
            InvalidInput: none are given, and none can be drawn.
        """
        if self.held_out is not None or self.chosen is not None:
            return self
        if isinstance(self.train, CrossMoments):
            raise InvalidInput(
                f"{self.what}: it chooses on held-out pairs, which moments do not give: "
                "validation=moments of other pairs, or give a single value"
            )
        return replace(self, chosen=self.train.draw_held_out(self.share, self.seed))

    @property
    def rows(self) -> PairedRows:
        """The pairs themselves, those that were chosen to be held out among them.

        Raises:
            InvalidInput: there are only moments.
        """
        return self._rows(self.train)

    @property
    def held_rows(self) -> PairedRows:
        """The held-out pairs themselves; of those that were chosen, all."""
        return self._rows(self.train if self.chosen is not None else self.held_out)

    @property
    def fitted(self) -> Bool[Tensor, " sequences"] | None:
        """Which sequences of `rows` are fitted to; all where None."""
        return None if self.chosen is None else ~self.chosen

    @cached_property
    def moments(self) -> CrossMoments:
        """Of the pairs to fit to."""
        return _moments_of(self.train, self.fitted)

    @cached_property
    def held_moments(self) -> CrossMoments:
        """Of the held-out pairs."""
        return _moments_of(self.held_rows if self.held_out is None else self.held_out, self.chosen)

    def through(self, features: Callable[[PairedRows], Tensor]) -> "MapProblem":
        """The problem with something else in the place of x, as moments."""
        held = None
        if self.held_out is not None or self.chosen is not None:
            held = self.held_rows.moments(features, where=self.chosen)
        return MapProblem(self.rows.moments(features, where=self.fitted), held, what=self.what)

    def _rows(self, data: Data | None) -> PairedRows:
        if not isinstance(data, PairedRows):
            raise InvalidInput(f"{self.what}: it needs pairs of rows, not their moments")
        return data


def check_data(what: str, data: Any) -> None:
    """Refuses what are neither pairs nor moments.

    Raises:
        InvalidInput: says how to make some.
    """
    if not isinstance(data, PairedRows | CrossMoments):
        raise InvalidInput(
            f"{what}: PairedRows or CrossMoments are needed, got {type(data).__name__}; "
            "PairedRows(x, y) makes them of rows"
        )


def _moments_of(data: Data, where: Tensor | None) -> CrossMoments:
    if isinstance(data, PairedRows):
        return data.moments(where=where)
    if not data.rows:
        raise InvalidInput("the moments are of no pairs; add some first")
    return data


def _widths(data: Data) -> tuple[int, int]:
    return data.d_source, data.d_target
