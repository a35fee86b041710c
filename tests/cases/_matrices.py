"""Matrices that are hard to select from: ties, infinities, NaN of both signs, no positive entry."""

from collections.abc import Callable

import torch
from torch import Tensor

SHAPES = [(0, 5), (3, 0), (1, 1), (3, 7), (5, 64), (17, 100), (9, 1000), (40, 2049), (2, 33_000)]


def _some(shape: tuple[int, int], share: float, value: float, g: torch.Generator) -> Tensor:
    """Normal numbers, a share of which is replaced."""
    return torch.where(
        torch.rand(shape, generator=g) < share, value, torch.randn(shape, generator=g)
    )


def _giant(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g)
    x[len(x) // 2] = x[len(x) // 2].abs() * 1000
    return x


def _nan(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    x = _some(shape, 0.1, torch.nan, g)
    return torch.where(torch.rand(shape, generator=g) < 0.5, x, -x)  # with a sign, too


VALUES: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "equal": lambda shape, g: torch.full(shape, 2.5),
    "zero": lambda shape, g: torch.zeros(shape),
    "negative": lambda shape, g: -torch.rand(shape, generator=g) - 0.1,
    "giant_row": _giant,
    "half_ties": lambda shape, g: _some(shape, 0.5, 1.0, g),
    "sparse": lambda shape, g: (
        torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.01)
    ),
    "ascending": lambda shape, g: torch.arange(shape[0] * shape[1]).reshape(shape) / 7,
    "nan": _nan,
    "all_nan": lambda shape, g: torch.full(shape, torch.nan),
    "inf": lambda shape, g: _some(shape, 0.1, torch.inf, g) + _some(shape, 0.1, -torch.inf, g),
    "tiny": lambda shape, g: torch.randn(shape, generator=g) * 1e-7,
}


def matrix(
    values: str, shape: tuple[int, int], dtype: torch.dtype, layout: str = "dense"
) -> Tensor:
    """A matrix with these values, in the memory of the layout."""
    x = VALUES[values](shape, torch.Generator().manual_seed(len(values) + shape[0])).to(dtype)
    rows, width = shape
    match layout:
        case "dense":
            return x
        case "wide_rows":  # cut from wider rows, starting one element in
            wide = x.new_full((rows, width + 3), torch.nan)
            wide[:, 1 : width + 1] = x
            return wide[:, 1 : width + 1]
        case "transposed":
            return x.T.contiguous().T
        case "expanded":  # one row, many times
            return x[:1].expand(rows, width)
    raise AssertionError(layout)


LAYOUTS = ("wide_rows", "transposed", "expanded")


def identical(case: object, got: list[Tensor], same: list[Tensor], exact: list[Tensor]) -> None:
    """A selection has one right result, to the last bit."""
    for mine, reference in zip(got, same, strict=True):
        assert torch.equal(mine.isnan(), reference.isnan())
        assert torch.equal(mine.nan_to_num(-1.0), reference.nan_to_num(-1.0))
