"""Maps and moments inside and outside of inference mode, of rows that require grad, of arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreamreader.fitting import Recipe
from dreamreader.mapping import (
    METHODS,
    ActivationMap,
    AffineMap,
    CrossMoments,
    PairedRows,
    fit_map,
    map_direction,
    score_map,
)
from tests.mapping.test_maps import EACH

RECIPE = Recipe(epochs=20, lr=1e-2, validate_every=None)


def draw(method: str = "ridge") -> tuple[PairedRows, dict[str, Any]]:
    """Pairs that each method can be fitted to, and its options."""
    x = torch.randn(60, 4, 3)
    y = x @ torch.randn(3, 3) + 0.1 * torch.randn(60, 4, 3)
    steps = torch.arange(60) % 2
    rows = PairedRows(x, y, groups=torch.arange(60) // 2, steps=steps, levels=steps + 1.0)
    gradient = method in ("affine", "mlp")
    return rows, {"recipe": RECIPE, "progress": False} if gradient else {}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_fitted_in_inference_mode_serves_gradients(method: str) -> None:
    rows, options = draw(method)
    expected = fit_map(rows, method, **options)
    with torch.inference_mode():
        inside = PairedRows(
            rows.x.clone(), rows.y.clone(), None, rows.groups, rows.steps, rows.levels
        )
        found = fit_map(inside, method, **options)
        score_map(found, inside, draws=10)
    assert found == expected
    with torch.no_grad():
        assert fit_map(rows, method, **options) == expected
    x = rows.x.double().requires_grad_()
    found.apply(x, step=rows.steps, level=rows.levels).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("form", EACH)
def test_copies_of_weights_outlive_inference_mode(form: str) -> None:
    with torch.inference_mode():
        made: ActivationMap = EACH[form]()
        made.apply(torch.zeros(2, 6, 4).double(), step=0, level=1.0)  # which keeps the copies
        made.apply(torch.zeros(2, 6, 4), step=0, level=1.0)
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(2, 6, 4, dtype=dtype, requires_grad=True)
        made.apply(x, step=0, level=1.0).square().sum().backward()
        assert x.grad is not None and bool(x.grad.any())


def test_moments_are_added_in_any_mode() -> None:
    x, y = torch.randn(9, 3), torch.randn(9, 2)
    expected = CrossMoments(3, 2)
    expected.add(x, y)
    with torch.inference_mode():
        one = CrossMoments(3, 2)
        one.add(x[:4].clone(), y[:4].clone())
        part = CrossMoments(3, 2)
        part.add(x[7:], y[7:])
        _ = one.source_scatter
    one.add(x[4:7], y[4:7])
    found = one + part
    found.add(x[:0], y[:0])
    torch.testing.assert_close(found.cross_scatter, expected.cross_scatter)
    wide = found.through(torch.eye(3), torch.zeros(3))
    torch.testing.assert_close(wide.source_scatter, expected.source_scatter)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_require_grad_are_taken_without_their_graph(method: str) -> None:
    rows, options = draw(method)
    x, y = rows.x.clone().requires_grad_(), rows.y.clone().requires_grad_()
    graph = PairedRows(x, y, None, rows.groups, rows.steps, rows.levels)
    found = fit_map(graph, method, **options)
    assert found == fit_map(rows, method, **options)
    assert not found.apply(rows.x, step=rows.steps, level=rows.levels).requires_grad
    assert score_map(found, graph, draws=5).fvu == score_map(found, rows, draws=5).fvu


def test_weights_of_a_map_are_part_of_no_graph() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    made = AffineMap(torch.zeros(4), weight, torch.zeros(3))
    assert not made.weight.requires_grad
    for dtype in (torch.float32, torch.float64):
        assert not made.apply(torch.zeros(2, 4, dtype=dtype)).requires_grad
        assert not map_direction(made, torch.ones(4, dtype=dtype)).requires_grad


def test_arrays_are_rows_and_lists_their_times() -> None:
    rows, _ = draw()
    assert rows.steps is not None and rows.levels is not None and rows.groups is not None
    given = PairedRows(
        rows.x.numpy(),  # pyright: ignore[reportArgumentType]
        rows.y.double().numpy(),  # pyright: ignore[reportArgumentType]
        None,
        rows.groups.numpy(),  # pyright: ignore[reportArgumentType]
        rows.steps.tolist(),  # pyright: ignore[reportArgumentType]
        rows.levels.tolist(),  # pyright: ignore[reportArgumentType]
    )
    lambdas = np.array([1e-3, 1e-1], dtype=np.float32)
    found = fit_map(given, "ridge", lambdas=lambdas, seed=np.int64(1))
    assert found == fit_map(rows, "ridge", lambdas=lambdas.tolist(), seed=1)
    one = fit_map(given, "ridge", lambdas=np.float32(0.5))
    assert one == fit_map(rows, "ridge", lambdas=torch.tensor(0.5))
    low = fit_map(given, "reduced_rank", rank=np.int64(2), lambdas=0.1)
    assert low == fit_map(rows, "reduced_rank", rank=torch.tensor([2]), lambdas=0.1)
    x, y = rows.x.flatten(0, 1), rows.y.flatten(0, 1)
    sums = CrossMoments(np.int64(3), 3)  # pyright: ignore[reportArgumentType]
    sums.add(x.numpy(), y.numpy(), [1.0] * len(x))  # pyright: ignore[reportArgumentType]
    assert torch.equal(sums.cross_scatter, PairedRows(x, y).moments().cross_scatter)


class _Largest(TorchDispatchMode):
    """The most numbers that any operation gave a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.size = max(self.size, each.untyped_storage().nbytes() // each.itemsize)
        return found


@pytest.mark.parametrize("method", ["ridge", "reduced_rank", "noise", "mlp"])
def test_holding_out_copies_no_rows(method: str) -> None:
    x = torch.randn(40_000, 8)
    rows = PairedRows(x, x.roll(1, 1), levels=torch.rand(40_000))
    options: dict[str, Any] = {}
    if method == "mlp":
        options = {
            "recipe": Recipe(steps=40, lr=1e-2, batch_size=256, validate_every=None),
            "progress": False,
        }
    with _Largest() as largest:
        fit_map(rows, method, **options)
    assert 40_000 <= largest.size <= 4096 * 40 < 0.8 * x.numel()
