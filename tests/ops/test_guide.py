"""Properties of probe guidance and of its gradient, and what is refused."""

import pytest
import torch
from torch import Tensor

from dreamreader import _register
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import guide
from tests.cases.guide import Case

NATIVE = _register.native()[0]
NEEDS_NATIVE = pytest.mark.skipif(NATIVE is None, reason="the native module is not built")


def call(x: Tensor, w: list, b: list, activation: str, c: Tensor, s: Tensor, *numbers) -> Tensor:
    """The public function with the arguments of the reference."""
    gamma, iterations, trust = numbers
    options = {"gamma": gamma, "iterations": iterations, "trust": trust}
    return guide(x, w, [b[0].squeeze(1), *b[1:]], c, s, activation=activation, **options)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("hidden", [(), (24,), (16, 12)], ids=str)
def test_a_step_is_that_of_autograd(activation: str, hidden: tuple[int, ...]):
    case = Case("autograd", (2, 7, 20), hidden, activation=activation, selection="all")
    x, w, b, _, c, s, *numbers = case.inputs(torch.float64)
    h = x.clone().requires_grad_()
    z = h
    for n, (weight, bias) in enumerate(zip(w, b, strict=True)):
        z = z @ weight.T + bias
        if n < len(hidden):
            z = getattr(torch.nn.functional, activation)(z)
    (gradient,) = torch.autograd.grad((z * c.unsqueeze(1)).sum(), h)
    found = call(x, w, b, activation, c, 0.3 * s, *numbers)
    torch.testing.assert_close(found, x - 0.3 * gradient, rtol=1e-12, atol=1e-12)


def test_a_number_as_strength_keeps_its_float64():
    x, w, b, _, c, *_ = Case("number", (2, 3, 6), (), selection="all").inputs(torch.float64)
    wanted = x - 0.1 * (c @ w[0]).unsqueeze(1)
    torch.testing.assert_close(guide(x, w, [b[0].squeeze(1)], c, 0.1), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_change_stays_in_the_trust_region(isa: str, dtype: torch.dtype):
    case = Case("trust", (2, 33, 64), (24, 24), iterations=4, trust=0.1, selection="all")
    x, *rest = case.inputs(dtype)
    y = call(x, *rest)
    share = (y.float() - x.float()).norm(dim=-1) / x.float().norm(dim=-1)
    slack = 1e-4 if dtype == torch.float32 else 1e-2
    assert float(share.max()) <= 0.1 * (1 + slack)
    assert float(share.max()) >= 0.1 * (1 - slack)
    free = call(x, *rest[:-1], torch.inf)
    assert float(((free.float() - x.float()).norm(dim=-1) / x.float().norm(dim=-1)).max()) > 0.2


def test_gradient_where_nothing_moves():
    """Dead units leave the norm of the change at 0, whose derivative must not become NaN."""
    x, w, b, *rest = Case("dead", (2, 3, 6), (5,), iterations=2, trust=0.3).inputs(torch.float64)
    b[0] = b[0] - 100
    x.requires_grad_()
    y = call(x, w, b, *rest)
    assert torch.equal(y, x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, 2 * x.detach())


def test_a_row_does_not_feel_its_batch(isa: str):
    case = Case("batch", (5, 21, 70), (40, 24), iterations=3, trust=0.5)
    x, w, b, activation, c, s, *numbers = case.inputs(torch.float32)
    together = call(x, w, b, activation, c, s, *numbers)
    for row in range(5):
        one = slice(row, row + 1)
        alone = call(x[one], w, [b[0][one], *b[1:]], activation, c[one], s[one], *numbers)
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_values_that_are_not_finite_stay_in_their_row(isa: str, activation: str, odd: float):
    case = Case("odd", (2, 15, 40), (24, 24), activation=activation, iterations=2, trust=3.0)
    x, *rest = case.inputs(torch.float32)
    clean = call(x, *rest)
    x = x.clone()
    x[1, 4, 7] = odd
    found = call(x, *rest)
    others = torch.ones(2, 15, dtype=torch.bool)
    others[1, 4] = False
    assert torch.equal(found[others], clean[others])
    assert not found[1, 4, 7].isfinite()


def test_half_precision_bits_of_rows_that_stay():
    x, w, b, activation, c, s, *numbers = Case("bits", (2, 8, 16)).inputs(torch.bfloat16)
    x.view(torch.int16)[0, 3] = 0x7FA5  # a NaN with a payload
    s = torch.zeros_like(s)
    s[1] = 1
    found = call(x, w, b, activation, c, s, *numbers)
    assert torch.equal(found[0].view(torch.int16), x[0].view(torch.int16))


def test_the_public_function_compiles_without_graph_breaks():
    x, w, b, activation, c, s, *numbers = Case("compiled", (2, 9, 40)).inputs(torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = x, w, b, activation, c, s, *numbers
    assert torch.equal(compiled(*arguments), call(*arguments))


X = torch.ones(2, 3, 4)
W, B, C = [torch.ones(5, 4), torch.ones(2, 5)], [torch.ones(5), torch.ones(2)], torch.ones(2)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            lambda: guide(X[0], W, B, C),
            r"\[batch, tokens, width\] of float32, .*, got torch.float32",
        ),
        (lambda: guide(X.long(), W, B, C), "got torch.int64"),
        (lambda: guide(X, W * 2, B * 2, C), "1 to 3 layers, each with a bias; got 4 weights"),
        (lambda: guide(X, W, B[:1], C), "got 2 weights and 1 biases"),
        (
            lambda: guide(X[..., :3], W, B, C),
            r"layer 0 gets 3 features, its weight is \[5, 4\] and its bias \[5\]",
        ),
        (lambda: guide(X, W, [B[0], torch.ones(2, 2)], C), r"layer 1 .* its bias \[2, 2\]"),
        (lambda: guide(X, [W[0].double(), W[1]], B, C), "layer 0 must be torch.float32 on cpu"),
        (
            lambda: guide(X, W, B, torch.ones(3)),
            r"coefficients must be \[2\] or \[2, 2\], .* \[3\]",
        ),
        (lambda: guide(X, W, B, C, torch.ones(3, 3)), r"strength \[3, 3\] does not broadcast"),
        (lambda: guide(X, W, B, C, iterations=0), "iterations must be at least 1, .* iterations=0"),
        (
            lambda: guide(X, W, B, C, iterations=2**31),
            "at most 2147483647, .* iterations=2",
        ),
        (
            lambda: guide(X, W, B, C, iterations=1.5),
            "whole and at most .* iterations=1.5",
        ),
        (lambda: guide(X, W, B, C, trust=-1.0), "trust=-1.0"),
        (lambda: guide(X, W, B, C, trust=torch.nan), "trust=nan"),
        (lambda: guide(X, W, B, C, gamma=torch.nan), "gamma=nan"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(wrong, text):
    with pytest.raises(InvalidInput, match=text):
        wrong()


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown activation of a probe 'rellu'; nearest: relu"):
        guide(X, W, B, C, activation="rellu")


@NEEDS_NATIVE
def test_the_kernel_refuses_what_it_would_follow_blindly():
    x, w, b, _, c, s, *_ = Case("raw", (2, 3, 8)).inputs(torch.float32)
    gram, out = torch.zeros(24, 24), torch.empty_like(x)

    def raw(**other):
        given = {"x": x, "out": out, "w": w, "b": b, "gram": gram, "c": c, "s": s} | other
        g = [given[name] for name in ("x", "out", "w", "b", "gram")]
        NATIVE.guide_cpu(*g, 0, given["c"], given["s"], 1.0, 2, torch.inf, 1)

    for other, text in [
        ({"x": x.double()}, "x and out must be of one type"),
        ({"out": out[:1]}, "out must be like x"),
        ({"w": [w[0].T, w[1]]}, "a weight must be float32"),
        ({"b": [b[0][:1], b[1]]}, "a bias must be float32"),
        ({"gram": gram[:3]}, "gram must be float32"),
        ({"gram": torch.zeros(0, 0)}, "gram is needed"),
        ({"c": c[:, :2]}, "coefficients must be float32"),
        ({"s": s.double()}, "strength must be float32"),
    ]:
        with pytest.raises(ValueError, match=text):
            raw(**other)
