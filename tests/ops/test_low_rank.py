"""Properties of the low-rank edit and its gradient, and what must be refused."""

import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import low_rank, low_rank_, orthonormal
from dreamreader.ops.low_rank import low_rank_backward_reference
from tests.cases._compare import same_bits
from tests.cases.low_rank import Case

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
OPS = torch.ops.dreamreader
ALL = (True, True, True, True)

by_dtype = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def test_only_the_gradients_that_are_asked_for_are_computed(poisoned: None):
    case = Case("needs", (2, 70, 33), strength="per_token")
    grad, x, *tables = case.gradient(torch.float32), *case.inputs(torch.float32)
    full = OPS.low_rank_backward(grad, x, *tables, ALL)
    for bits in range(16):
        needs = [bool(bits >> i & 1) for i in range(4)]
        per_result = (needs[0], needs[1], needs[1], needs[2], needs[3])
        for compute in (OPS.low_rank_backward, low_rank_backward_reference):
            for wanted, got, all_of in zip(
                per_result, compute(grad, x, *tables, needs), full, strict=True
            ):
                assert got.shape == (all_of.shape if wanted else (0,))
                assert not wanted or torch.allclose(got, all_of, rtol=1e-5, atol=1e-5)


def test_a_number_as_strength_keeps_its_float64():
    x, down, bias, up, *_ = Case("public", (2, 4, 6)).inputs(torch.float64)
    wanted = x + 0.1 * ((x @ down[0].T + bias[0]) @ up[0])
    assert torch.allclose(low_rank(x, down, bias, up, 0.1), wanted, rtol=1e-13, atol=1e-13)


def test_gradients_reach_tables_without_adapters_and_strength():
    x, down, bias, up, *_ = Case("public", (2, 4, 6)).inputs(torch.float32)
    tables = [each[0].clone().requires_grad_() for each in (down, bias, up)]
    strength = torch.tensor([[1.0], [0.0]], requires_grad=True)
    low_rank(x, *tables, strength).square().sum().backward()
    assert [each.grad.shape for each in tables] == [each.shape for each in tables]
    assert strength.grad.shape == (2, 1)
    assert float(strength.grad[1].abs()) > 0  # the formula's derivative at 0
    once = [each.grad.clone() for each in tables]
    for each in tables:
        each.grad = None
    low_rank(x[:1], *tables).square().sum().backward()
    for mine, other in zip(once, tables, strict=True):
        torch.testing.assert_close(mine, other.grad)


@by_dtype
def test_rows_end_in_the_subspace_and_stay_outside_it(dtype: torch.dtype):
    """METHODS 6: R y = W x + b, (1 - R'R)(y - x) = 0."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(6)
    r = orthonormal(torch.randn(8, 96, generator=g, dtype=wide))
    w, b = torch.randn(8, 96, generator=g, dtype=wide), torch.randn(8, generator=g, dtype=wide)
    x = torch.randn(2, 50, 96, generator=g, dtype=wide).to(dtype)
    y = low_rank(x, w - r, b, r).to(wide)
    moved = y - x.to(wide)
    tolerance = 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(y @ r.T, x.to(wide) @ w.T + b, rtol=0, atol=tolerance)
    outside = moved - moved @ r.T @ r
    assert float(outside.abs().max()) < tolerance


@by_dtype
def test_an_identity_keeps_every_bit(dtype: torch.dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    r = orthonormal(torch.randn(3, 40, dtype=wide))
    x = torch.randn(2, 9, 40).to(dtype)
    x[0, 0] = -0.0
    x[0, 1, 3] = torch.nan
    for out in (
        low_rank(x, torch.zeros_like(r), torch.zeros(3, dtype=wide), r),
        low_rank(x, torch.randn_like(r), torch.ones(3, dtype=wide), r, 0.0),
    ):
        assert same_bits(out[0, 0], x[0, 0])
        assert same_bits(out[0, 2:], x[0, 2:]) and same_bits(out[1], x[1])
    assert same_bits(low_rank(x, r, torch.ones(3, dtype=wide), r, 0.0), x)


@pytest.mark.parametrize("layout", ["dense", "nchw"])
def test_values_that_are_not_finite_stay_in_their_row(layout: str):
    case = Case("odd", (2, 40, 50), layout=layout, strength="one", adapters=2, index=(0, 1))
    x, *tables = case.inputs(torch.float32)
    clean = OPS.low_rank(x, *tables)
    dirty = x.clone()
    dirty[0, 3, 7], dirty[0, 20, 1] = torch.nan, torch.inf
    out = OPS.low_rank(dirty, *tables)
    assert out[0, 3].isnan().all() and not out[0, 20].isfinite().any()
    rest = torch.ones(2, 40, dtype=torch.bool)
    rest[0, [3, 20]] = False
    assert same_bits(out[rest], clean[rest])
    grad = case.gradient(torch.float32)
    _, d_down, _, _, d_strength = OPS.low_rank_backward(grad, dirty, *tables, ALL)
    assert d_down[0].isnan().any() and d_down[1].isfinite().all()
    assert d_strength[rest].isfinite().all()
    strength = tables[3].clone()
    strength[0, [3, 20]] = 0
    tables[3] = strength
    for part in OPS.low_rank_backward(grad, dirty, *tables, ALL)[:4]:
        assert part.isfinite().all()


def test_an_expanded_gradient():
    x, *tables = Case("sum", (2, 5, 9)).inputs(torch.float32)
    one = torch.ones(()).expand(2, 5, 9)
    got = OPS.low_rank_backward(one, x, *tables, ALL)
    want = OPS.low_rank_backward(torch.ones(2, 5, 9), x, *tables, ALL)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_in_place_raises_the_version_and_refuses_gradients():
    x, *tables = Case("place", (2, 5, 9)).inputs(torch.float32)
    version = x._version
    assert low_rank_(x, *tables) is x
    assert x._version == version + 1
    with pytest.raises(InvalidInput, match="low_rank_: x requires grad and an edit in place"):
        low_rank_(x.requires_grad_(), *tables)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    x, *tables = Case("compile", (2, 7, 20), layout="nchw").inputs(torch.float32)

    def loss(x: Tensor, up: Tensor) -> Tensor:
        y = OPS.low_rank(x, *tables[:2], up, *tables[3:])
        with torch.no_grad():
            OPS.low_rank_(y.detach().clone(), *tables)
        return y.square().sum()

    up = tables[2].clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, up), loss(x, up))
    (mine,) = torch.autograd.grad(compiled(x, up), up)
    (eager,) = torch.autograd.grad(loss(x, up), up)
    torch.testing.assert_close(mine, eager)


X, D, B = torch.ones(2, 3, 4), torch.ones(1, 2, 4), torch.ones(1, 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: low_rank(X[0], D, B, D), r"low_rank: x must be floating .*got float32 \[3, 4\]"),
        (lambda: low_rank(X.long(), D, B, D), r"floating point .*, got int64 \[2, 3, 4\]"),
        (lambda: low_rank(X[..., :3], D, B, D), r"x has 3 features, down is \[1, 2, 4\]"),
        (lambda: low_rank(X, D, B, D[:, :1]), r"up must be the same .* got \[1, 1, 4\] and \[1, 2"),
        (lambda: low_rank(X, D, B[0], D), r"bias \[1, 2\]; got \[1, 2, 4\] and \[2\]"),
        (
            lambda: low_rank(X, D.new_ones(257, 4), B.new_ones(257), D.new_ones(257, 4)),
            "rank 257, from 1 to 256 is possible",
        ),
        (
            lambda: low_rank(X, D.double(), B, D),
            "down must be torch.float32 there, got torch.float64",
        ),
        (lambda: low_rank(X, D[:0], B[:0], D[:0]), "low_rank: down holds no adapter"),
        (
            lambda: low_rank(X.double(), D, B, D),
            "x is torch.float64 on cpu, so down must be torch.f",
        ),
        (
            lambda: low_rank(X, D, B, D, torch.ones(5)),
            r"strength \[5\] does not broadcast to \[2, 3\]",
        ),
        (
            lambda: low_rank(X, D, B, D, index=torch.zeros(3, dtype=torch.int64)),
            r"index must be int64 \[2\] on cpu, got int64 \[3\]",
        ),
        (
            lambda: low_rank_(X, D, B, D, index=torch.zeros(2)),
            r"low_rank_: index must be int64 \[2\]",
        ),
    ],
)
def test_wrong_inputs_say_what_is_wrong(call, text):
    with pytest.raises(InvalidInput, match=text):
        call()


@NEEDS_NATIVE
def test_the_kernel_refuses_what_it_would_follow_blindly():
    x, down, bias, up, strength, index = Case("raw", (2, 3, 8)).inputs(torch.float32)
    for bad in (1, -1):
        with pytest.raises(ValueError, match="an index is outside the table of adapters"):
            NATIVE.low_rank_cpu(x, x, down, bias, up, strength, index + bad, 1)
    with pytest.raises(ValueError, match=r"down and up must be dense \[adapters, rank, width\]"):
        NATIVE.low_rank_cpu(x, x, down, bias, up[..., :4], strength, index, 1)
    with pytest.raises(ValueError, match="the result has elements that share memory"):
        NATIVE.low_rank_cpu(x, x[:1].expand(2, 3, 8), down, bias, up, strength, index, 1)
    with pytest.raises(ValueError, match="x, its result and their gradients differ"):
        NATIVE.low_rank_cpu(x, x.half(), down, bias, up, strength, index, 1)
    none = torch.empty(0)
    with pytest.raises(ValueError, match="a gradient is not dense or unlike its table"):
        NATIVE.low_rank_backward_cpu(
            x, x, down, bias, up, strength, index, none, none, none, up[:, :1], none, 1
        )
