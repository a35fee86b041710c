"""Probe guidance: moves activations along the gradient of a probe's logits (K-steering).

    h_{t+1} = h_t - s gamma^t grad_h sum_k c_k z_k(h_t),   t = 0 .. iterations - 1

with the logits z of a perceptron of one to three linear layers, c_k = 1 / |avoid| for the labels to
avoid and -1 / |target| for those to reach. After every step the whole change is held within
`trust` times the norm of h_0.

Every step is a multiple of the rows of the first layer, h_t = h_0 - W1' e_t, so that kernels need
the width only at the beginning and at the end: with G = W1 W1', the first layer gives
a_t = a_0 - G e_t, and the change has the squared norm e' G e.
"""

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader import _alloc
from dreamreader._guards import autograd_on
from dreamreader._register import Kernel, native, register
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops._norm import row_norm
from dreamreader.ops._types import FLOATS, NEEDED

ACTIVATIONS = ("relu", "gelu", "silu")
MAX_LAYERS = 3
MAX_ITERATIONS = 2**31 - 1

# Of the kernel for the CPU, which packs the first layer before it uses it.
MAX_HIDDEN = 1024
FEW_TOKENS = 16
MANY_WEIGHTS = 1 << 18

ARGUMENTS = (
    "Tensor[] weights, Tensor[] biases, str activation, Tensor coefficients, Tensor strength, "
    "float gamma, int iterations, float trust"
)


def guide(
    x: Float[Tensor, "batch tokens width"],
    weights: Sequence[Float[Tensor, "_outputs _inputs"]],
    biases: Sequence[Float[Tensor, "... _outputs"]],
    coefficients: Float[Tensor, "... labels"],
    strength: float | Float[Tensor, "..."] = 1.0,
    *,
    activation: str = "relu",
    gamma: float = 1.0,
    iterations: int = 1,
    trust: float = torch.inf,
) -> Float[Tensor, "batch tokens width"]:
    """Moves every row against the gradient of a weighted sum of a probe's logits.

    Formula: see the module; computed in float32 (float64 for float64), rounded once.

    Args:
        x: activation [batch, tokens, width] of any strides, float32, bfloat16, float16 or float64.
        weights: of one to three linear layers, each [outputs, inputs], float32 (float64 for float64
            x); the last gives the logits.
        biases: one for each layer, [outputs]; that of the first may be [batch, outputs], by which a
            probe hears of the noise level.
        coefficients: c, [batch, labels] or [labels].
        strength: s, a number or a tensor that broadcasts to [batch, tokens]. 0 leaves a row
            untouched bit for bit.
        activation: between layers, `relu` (with derivative 0 at 0), `gelu` (exact) or `silu`.
        gamma: factor of the strength from one step to the next.
        iterations: number of steps.
        trust: largest norm of the whole change, as a multiple of the norm of the row.

    Returns:
        A new tensor with the shape, dtype and memory order of `x`. Differentiable in `x` alone.

    Raises:
        InvalidInput: shapes, dtypes or devices that do not fit, more than three layers, a negative
            trust, less than one iteration.
        UnknownName: of the activation.

    Example:
        >>> import torch
        >>> probe = [torch.tensor([[1.0, 0.0], [0.0, 1.0]])], [torch.zeros(2)]
        >>> guide(torch.zeros(1, 1, 2), *probe, torch.tensor([1.0, -1.0]), 0.5)
        tensor([[[-0.5000,  0.5000]]])

    Reference:
        Beyond Linear Steering: Unified Multi-Attribute Control for Language Models (2505.24535).
    """
    arguments = _check_all(x, weights, biases, coefficients, strength, activation)
    whole = isinstance(iterations, int) and 1 <= iterations <= MAX_ITERATIONS
    if not whole or not trust >= 0 or not math.isfinite(gamma):
        raise InvalidInput(
            f"guide: iterations must be at least 1, whole and at most {MAX_ITERATIONS}, trust at "
            f"least 0 and gamma finite; got iterations={iterations}, trust={trust}, gamma={gamma}"
        )
    return _guide(x, *arguments, float(gamma), iterations, float(trust))


def guide_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    coefficients: Tensor,
    strength: Tensor,
    gamma: float,
    iterations: int,
    trust: float,
) -> Tensor:
    """The definition of `guide` in plain torch: every step in the full width, on any device.

    Args:
        x: [B, T, D]. weights: [H_i, H_{i-1}], H_0 = D. biases: [B, 1, H_1], then [H_i].
        coefficients: [B, K]. strength: [B, T].

    Returns:
        [B, T, D] like x.
    """
    c = coefficients.unsqueeze(1)  # [B, 1, K]
    h = descend(
        x.to(strength.dtype),
        strength.unsqueeze(-1),
        gamma,
        iterations,
        trust,
        lambda h: probe_gradient(h, weights, biases, activation, c),
    )
    out = _alloc.empty_like(x)
    out.copy_(torch.where(strength.unsqueeze(-1) != 0, h.to(x.dtype), x))
    return out


def descend(
    h0: Tensor,
    s: Tensor,
    gamma: float,
    iterations: int,
    trust: float,
    gradient: Callable[[Tensor], Tensor],
) -> Tensor:
    """[B, T, D]: h_0 after all steps along any gradient, each within the trust region.

    Args:
        h0: [B, T, D]. s: [B, T, 1]. gradient: of h, shaped like it.
    """
    h = h0
    for t in range(iterations):
        h = h - s * gamma**t * gradient(h)
        if trust < torch.inf:
            change = h - h0
            norm, limit = row_norm(change), trust * row_norm(h0)  # [B, T, 1]
            beyond = norm > limit
            # 1 where nothing is cut: the derivative of a quotient by 0 would be NaN there
            share = limit / torch.where(beyond, norm, 1)
            h = torch.where(beyond, h0 + change * share, h)
    return h


def probe_gradient(
    h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, c: Tensor
) -> Tensor:
    """[B, T, D]: gradient of sum_k c_k z_k, one row at a time."""
    slopes = []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        a = h @ weight.T + bias
        h, slope = activate(a, activation)
        slopes.append(slope)
    u = c @ weights[-1]  # [B, 1, H]
    for weight, slope in zip(reversed(weights[:-1]), reversed(slopes), strict=True):
        u = (u * slope) @ weight
    return u


def activate(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Value and derivative of an activation."""
    match activation:
        case "relu":
            return torch.relu(a), (a > 0).to(a.dtype)
        case "gelu":
            share = 0.5 * (1 + torch.erf(a * 0.5**0.5))
            return a * share, share + a * torch.exp(-0.5 * a * a) * (0.5 / torch.pi) ** 0.5
    share = torch.sigmoid(a)  # silu
    return a * share, share * (1 + a * (1 - share))


def guide_backward_reference(grad: Tensor, x: Tensor, *arguments) -> Tensor:
    """Gradient of x, [B, T, D] like grad, by autograd through the definition.

    While torch records and x requires grad, the result can be differentiated again.
    """
    strength = arguments[4]
    again = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad(), autograd_on():
        wide = x.to(strength.dtype) if again else x.detach().to(strength.dtype).requires_grad_()
        y = guide_reference(wide, *arguments)
        (found,) = torch.autograd.grad(y, wide, grad.to(strength.dtype), create_graph=again)
    out = _alloc.empty_like(grad)
    out.copy_(torch.where(strength.unsqueeze(-1) != 0, found.to(grad.dtype), grad))
    return out


def _check_all(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    coefficients: Tensor,
    strength: float | Tensor,
    activation: str,
) -> tuple[list[Tensor], list[Tensor], str, Tensor, Tensor]:
    """The arguments with all their dimensions, without gradients."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        raise InvalidInput(
            f"guide: x must be floating point [batch, tokens, width] of {NEEDED}, got {x.dtype} "
            f"{list(x.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise UnknownName("activation of a probe", activation, ACTIVATIONS)
    if not 1 <= len(weights) <= MAX_LAYERS or len(biases) != len(weights):
        raise InvalidInput(
            f"guide: 1 to {MAX_LAYERS} layers, each with a bias; got {len(weights)} weights and "
            f"{len(biases)} biases"
        )
    batch, inputs = x.shape[0], x.shape[2]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        shapes = [weight.shape[:1]] + ([(batch, len(weight))] if n == 0 else [])
        if weight.dim() != 2 or weight.shape[1] != inputs or bias.shape not in shapes:
            raise InvalidInput(
                f"guide: layer {n} gets {inputs} features, its weight is {list(weight.shape)} and "
                f"its bias {list(bias.shape)}"
            )
        if {weight.dtype, bias.dtype} != {wide} or {weight.device, bias.device} != {x.device}:
            raise InvalidInput(
                f"guide: layer {n} must be {wide} on {x.device}, its weight is {weight.dtype} on "
                f"{weight.device} and its bias {bias.dtype} on {bias.device}"
            )
        inputs = len(weight)
    if coefficients.shape not in ((inputs,), (batch, inputs)):
        raise InvalidInput(
            f"guide: coefficients must be [{inputs}] or [{batch}, {inputs}], one for each label, "
            f"got {list(coefficients.shape)}"
        )
    if not isinstance(strength, Tensor):
        strength = torch.full((), strength, dtype=wide)
    try:
        strength = strength.detach().to(x.device, wide).expand(x.shape[:2])
    except RuntimeError:
        raise InvalidInput(
            f"guide: strength {list(strength.shape)} does not broadcast to {list(x.shape[:2])}"
        ) from None
    first = biases[0].detach().expand(batch, -1).unsqueeze(1)  # [B, 1, H_1]
    rest = [each.detach() for each in biases[1:]]
    c = coefficients.detach().to(x.device, wide).expand(batch, -1)
    return [each.detach() for each in weights], [first, *rest], activation, c, strength


def _cpu(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    coefficients: Tensor,
    strength: Tensor,
    gamma: float,
    iterations: int,
    trust: float,
) -> Tensor:
    if x.dtype == torch.float64 or _rather_plain(x, weights):
        arguments = weights, biases, activation, coefficients, strength
        return guide_reference(x, *arguments, gamma, iterations, trust)
    out = _alloc.empty_like(x)
    if bool((strength == 0).any()):
        out.copy_(x)
    gram = strength.new_empty(0, 0)
    if trust < torch.inf or (len(weights) > 1 and iterations > 1):
        wide = weights[0].double()
        gram = (wide @ wide.T).float()
    _native.guide_cpu(
        x,
        out,
        weights,
        biases,
        gram,
        ACTIVATIONS.index(activation),
        coefficients,
        strength,
        gamma,
        iterations,
        trust,
        torch.get_num_threads(),
    )
    return out


def _rather_plain(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the kernel has no gain: layers that are too wide for it, or more work to pack than to
    use. Not a matter of the batch, whose rows must not feel each other."""
    hidden = max((len(each) for each in weights[:-1]), default=0)
    return hidden > MAX_HIDDEN or (x.shape[1] < FEW_TOKENS and weights[0].numel() > MANY_WEIGHTS)


def _triton(x: Tensor, weights: Sequence[Tensor], *arguments) -> Tensor:
    kernel = import_module(_TRITON)
    if not kernel.supported(x, weights):
        return guide_reference(x, weights, *arguments)
    out = _alloc.empty_like(x)
    kernel.guide(x, out, [each.contiguous() for each in weights], *arguments)
    return out


def _fake(x: Tensor, *arguments) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    x, weights, biases, activation, coefficients, strength, *numbers = inputs
    ctx.counts = len(weights), len(biases)
    ctx.rest = activation, numbers
    ctx.save_for_backward(x, coefficients, strength, *weights, *biases)


def _backward(ctx, grad: Tensor) -> tuple:
    return _gradients(ctx, grad, _guide_backward)


def _twice(ctx, grad: Tensor) -> tuple:
    return _gradients(ctx, grad, guide_backward_reference)


def _gradients(ctx, grad: Tensor, compute: Callable) -> tuple:
    x, coefficients, strength, *layers = ctx.saved_tensors
    weights, biases = layers[: ctx.counts[0]], layers[ctx.counts[0] :]
    activation, numbers = ctx.rest
    dx = compute(grad, x, weights, biases, activation, coefficients, strength, *numbers)
    none = [None] * ctx.counts[0], [None] * ctx.counts[1]
    return dx, *none, None, None, None, None, None, None


_native: Any = native()[0]
_TRITON = "dreamreader.triton_kernels.guide"

_guide = register(
    "guide",
    f"(Tensor x, {ARGUMENTS}) -> Tensor",
    reference=guide_reference,
    fake=_fake,
    cpu=Kernel("guide_cpu", _cpu),
    triton=Kernel(_TRITON, _triton),
    setup_context=_setup_context,
    backward=_backward,
    twice=_twice,
)
_guide_backward = register(
    "guide_backward",
    f"(Tensor grad, Tensor x, {ARGUMENTS}) -> Tensor",
    reference=guide_backward_reference,
    fake=_fake,
)
