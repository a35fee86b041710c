"""Maps that read a place together with its neighbours on a grid."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, linear

from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap, CastTensors, check_shape
from dreamreader.mapping.checks import check_whole


@dataclass(frozen=True, eq=False, repr=False)
class LocalMap(ActivationMap, form="local"):
    """y at a place of a grid = b + sum over its k x k neighbours of W_ij x_ij, a convolution.

    Beyond the border of the grid there is zero, not the mean.

    Attributes:
        weight: W [d_target, d_source, k, k], k odd. bias: b [d_target].
        grid: (height, width) of the tokens.
    """

    weight: Float[Tensor, "d_target d_source k k"]
    bias: Float[Tensor, " d_target"]
    grid: tuple[int, int]
    _cast: CastTensors = field(default_factory=CastTensors, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "grid", check_grid(self.grid))
        check_shape("LocalMap", "source_mean", self.source_mean, len(self.source_mean))
        out, _, k, _ = self.weight.shape if self.weight.dim() == 4 else (1, 1, 1, 1)
        check_shape("LocalMap", "weight", self.weight, out, self.d_source, k, k)
        check_shape("LocalMap", "bias", self.bias, out)
        if not k % 2:
            raise InvalidInput(f"LocalMap: k is odd, so that a place has a middle, got {k}")

    @property
    def d_target(self) -> int:
        return len(self.weight)

    @property
    def k(self) -> int:
        """Places on each side of the neighbourhood."""
        return self.weight.shape[3]

    def apply(
        self,
        x: Float[Tensor, "*batch tokens d_source"],
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch tokens d_target"]:
        """See `ActivationMap.apply`; the tokens are those of the grid, line by line."""
        self.check(x)
        height, width = self.grid
        if x.dim() < 2 or x.shape[-2] != height * width:
            raise InvalidInput(
                f"{self.name}: x must be [..., {height * width}, {self.d_source}], the tokens of a "
                f"grid of {height} x {width}, got {list(x.shape)}"
            )
        maps = x.reshape(-1, height, width, self.d_source).permute(0, 3, 1, 2)
        weight = self._cast.get("weight", self.weight, x)
        found = conv2d(maps, weight, self._cast.get("bias", self.bias, x), padding=self.k // 2)
        return found.flatten(2).mT.reshape(*x.shape[:-1], self.d_target)

    def direction(
        self,
        v: Float[Tensor, "*batch d_source"],
        at: Float[Tensor, "*place d_source"] | None = None,
        alpha: float = 1.0,
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        """(sum of W_ij) (alpha v): of a step along v at all places, away from the border."""
        self.check_direction(v, at, alpha)
        whole = self.weight.to(v.device, torch.float64).sum((2, 3))
        return linear(alpha * v.double(), whole).to(v.dtype)


def check_grid(grid: Any) -> tuple[int, int]:
    """(height, width) as whole numbers.

    Raises:
        InvalidInput: it is no such pair.
    """
    if isinstance(grid, str | Tensor) or not isinstance(grid, Iterable) or len(list(grid)) != 2:
        raise InvalidInput(f"local map: grid is (height, width), got {grid!r}")
    height, width = (check_whole("local map: height and width of grid", each, 1) for each in grid)
    return height, width


def square_grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid that tokens stand on, a square where none is given.

    Raises:
        InvalidInput: they are not as many.
    """
    side = round(tokens**0.5)
    height, width = check_grid((side, side) if grid is None else grid)
    if height * width != tokens:
        what = "a square grid" if grid is None else f"a grid of {height} x {width}"
        raise InvalidInput(f"local map: {tokens} tokens are not those of {what}; give grid=(h, w)")
    return height, width
