"""Orthonormal rows: how exact they are, where the fallback takes over, and their gradient."""

import pytest
import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops import orthonormal
from dreamreader.ops.orthonormal import orthonormal_reference

BOUND = 2e-6  # of max |Q Q' - 1| in float32
OP = torch.ops.dreamreader.orthonormal.default


def off(q: Tensor) -> float:
    """max |Q Q' - 1|, in float64."""
    wide = q.double()
    return float((wide @ wide.mT - torch.eye(q.shape[-2], dtype=torch.float64)).abs().max())


def conditioned(rank: int, width: int, condition: float, seed: int = 0) -> Tensor:
    """Rows [rank, width] whose singular values go from 1 down to 1 / condition."""
    g = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, rank, generator=g, dtype=torch.float64))[0]
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), rank, dtype=torch.float64)
    return (left * values) @ right.T


@pytest.mark.parametrize("condition", [1.0, 1e2, 3e3, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("shape", [(8, 640), (32, 320), (64, 64)], ids=str)
def test_rows_are_orthonormal_and_span_the_same(shape: tuple[int, int], condition: float):
    x = conditioned(*shape, condition)
    q = orthonormal(x.float())
    assert q.dtype == torch.float32 and off(q) <= BOUND
    exact = orthonormal(x)
    assert off(exact) < 1e-13
    if condition <= 1e4:  # beyond, float32 itself no longer says what the smallest rows span
        outside = q.double() - q.double() @ exact.T @ exact
        assert float(outside.abs().max()) < 1e-5 * condition**0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 5), (3, 17)], ids=str)
def test_small_shapes(shape: tuple[int, int]):
    x = torch.randn(shape)
    q, lower = OP(x)
    assert off(q) <= BOUND
    torch.testing.assert_close(lower @ q, x)
    assert (lower.diagonal() > 0).all() and torch.equal(lower, lower.tril())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[1].copy_(x[0]),
        lambda x: x[2].zero_(),
        lambda x: x.zero_(),
        lambda x: x[3].copy_(x[0] - 2 * x[1]),
        lambda x: x[0].mul_(1e-30),
        lambda x: x.mul_(1e25),
    ],
    ids=["duplicate", "zero_row", "all_zero", "dependent", "tiny_row", "huge"],
)
def test_rows_that_depend_on_each_other_become_orthonormal_all_the_same(spoil):
    x = torch.randn(6, 50)
    spoil(x)
    q, lower = OP(x)
    assert q.isfinite().all() and off(q) <= BOUND
    scale = float(x.abs().max())
    torch.testing.assert_close(lower @ q, x, rtol=0, atol=2e-5 * scale + 1e-30)
    assert (lower.diagonal() >= 0).all()


def test_orthonormal_rows_stay():
    q = orthonormal(conditioned(16, 200, 10.0).float())
    torch.testing.assert_close(orthonormal(q), q, rtol=0, atol=1e-6)
    torch.testing.assert_close(orthonormal(3 * q), q, rtol=0, atol=1e-6)
    torch.testing.assert_close(orthonormal(-q), -q, rtol=0, atol=1e-6)


def test_a_stack_is_its_parts():
    x = torch.stack([conditioned(5, 30, 10.0, seed).float() for seed in range(4)])
    bad = x.clone()
    bad[2, 1] = bad[2, 0]  # the fallback for one of them is the fallback for all
    for stack in (x, bad):
        q = orthonormal(stack.view(2, 2, 5, 30)).view(4, 5, 30)
        assert max(off(mine) for mine in q) <= BOUND
        for i in (0, 1, 3):
            torch.testing.assert_close(q[i], orthonormal(stack[i]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype):
    x = torch.randn(8, 64).to(dtype).requires_grad_()
    q = orthonormal(x)
    assert q.dtype == torch.float32 and off(q.detach()) <= BOUND
    assert torch.equal(q, orthonormal(x.float()))
    q.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (2, 0, 4), (0, 2, 4)], ids=str)
def test_no_rows_are_orthonormal(shape: tuple[int, ...]):
    x = torch.zeros(shape, requires_grad=True)
    q = orthonormal(x)
    assert q.shape == shape and torch.autograd.grad(q.sum(), x)[0].shape == shape


def test_strided_rows():
    x = torch.randn(40, 6)
    torch.testing.assert_close(orthonormal(x.T), orthonormal(x.T.contiguous()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (3, 7), (4, 4), (2, 3, 5)], ids=str)
def test_gradcheck(shape: tuple[int, ...]):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal, x)


def test_the_fallback_has_the_same_gradient():
    x = conditioned(4, 20, 1e7).float()  # Cholesky fails in float32
    assert int(torch.linalg.cholesky_ex(x @ x.T).info) > 0 or off(orthonormal(x)) <= BOUND
    weight = torch.randn(4, 20, dtype=torch.float64)
    grads = []
    for rows in (x.clone().requires_grad_(), x.double().requires_grad_()):
        (orthonormal(rows)[0] * weight[0].to(rows.dtype)).sum().backward()  # the best of the rows
        grads.append(rows.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2 * float(grads[1].abs().max()))


def test_a_training_loop_in_bfloat16_stays_orthonormal():
    g = torch.Generator().manual_seed(3)
    raw = torch.randn(8, 96, generator=g).bfloat16().requires_grad_()
    target = orthonormal(torch.randn(8, 96, generator=g))
    optimizer = torch.optim.AdamW([raw], lr=3e-2)
    worst, first, loss = 0.0, 0.0, torch.zeros(())
    for step in range(200):
        q = orthonormal(raw)
        worst = max(worst, off(q.detach()))
        loss = (q.T @ q - target.T @ target).square().sum()
        first = first if step else float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert worst <= BOUND
    assert float(loss.detach()) < 0.1 * first


def test_opcheck():
    torch.library.opcheck(OP, (torch.randn(2, 3, 7, requires_grad=True),))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    def loss(x: Tensor) -> Tensor:
        return OP(x)[0].square()[:, 0].sum()

    x = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


def test_the_reference_is_the_operator():
    x = torch.randn(3, 9)
    assert all(torch.equal(a, b) for a, b in zip(OP(x), orthonormal_reference(x), strict=True))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: orthonormal(torch.ones(5, 4)),
            r"rank <= width is needed, got torch.float32 \[5, 4\]",
        ),
        (lambda: orthonormal(torch.ones(4)), r"is needed, got torch.float32 \[4\]"),
        (lambda: orthonormal(torch.ones(2, 4).long()), r"is needed, got torch.int64 \[2, 4\]"),
        (
            lambda: orthonormal(torch.tensor([[1.0, torch.nan]])),
            "x has values that are not finite",
        ),
        (
            lambda: orthonormal(torch.tensor([[torch.inf, 1.0]])),
            "x has values that are not finite",
        ),
    ],
)
def test_wrong_inputs_say_what_is_wrong(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()
