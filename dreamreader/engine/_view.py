"""A value seen as [rows, tokens, features] without a copy where its strides allow it, and back."""

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from dreamreader.engine._axes import Axes

_PLACES = ("frames", "height", "width", "tokens")


class View:
    """How values of one shape are read and written in the canonical layout.

    Feature maps [rows, features, height, width] become [rows, height * width, features] and keep
    `hw`; [rows, features] gets one token; heads stand side by side in the features. A flattened
    batch [rows * tokens, features] is opened again.

    Args:
        axes: names of the dimensions, see `axes_of`.
        shape: of the value.
        flat: (rows, tokens) of a flattened batch.
    """

    __slots__ = ("axes", "shape", "flat", "hw", "heads", "is_plain", "_order", "_places")

    def __init__(self, axes: Axes, shape: Sequence[int], flat: tuple[int, int] | None = None):
        self.axes = axes
        self.shape = tuple(shape)
        self.flat = flat
        sizes = dict(zip(axes, shape, strict=True))
        places = [name for name in axes if name in _PLACES]
        self._places = tuple(sizes[name] for name in places)
        self.heads = sizes.get("heads")
        grid = "height" in sizes or "frames" in sizes
        self.hw = self._places if grid else None
        self.is_plain = len(self.shape) == 3 and axes[1:] == ("tokens", "features")
        order = [name for name in ("rows", *places, "heads", "features") if name in sizes]
        self._order = [axes.index(name) for name in order]

    def read(self, value: Tensor) -> Tensor:
        """[rows, tokens, features]; a view of the value's memory where that can be."""
        if self.is_plain:
            return value
        if self.flat is not None:
            return value.unflatten(0, self.flat)
        if len(self.shape) < 2:
            return value.reshape(*self.shape, *(1,) * (3 - len(self.shape)))
        x = value.permute(self._order)
        if self.heads is not None:
            x = x.flatten(-2)
        if not self._places:
            return x.unsqueeze(1)
        return x.flatten(1, len(self._places)) if len(self._places) > 1 else x

    def back(self, y: Tensor) -> Tensor:
        """The value with the canonical values `y` in it."""
        if self.is_plain:
            return y
        if self.flat is not None:
            return y.flatten(0, 1)
        if len(self.shape) < 2:
            return y.reshape(self.shape)
        if not self._places:
            y = y.squeeze(1)
        elif len(self._places) > 1:
            y = y.unflatten(1, self._places)
        if self.heads is not None:
            y = y.unflatten(-1, (self.heads, -1))
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        return y.permute(inverse)


view_of = lru_cache(maxsize=1024)(View)  # the first visits of many sites ask for the same
