"""Orthonormal rows that span what given rows span: the retraction of LoReFT's rotation."""

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._register import register
from dreamreader.errors import InvalidInput
from dreamreader.ops._types import FLOATS, NEEDED

# Two rounds stay below 5e-7 in float32 up to condition 3e3; what is above comes from worse rows.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def orthonormal(x: Float[Tensor, "*adapters rank width"]) -> Float[Tensor, "*adapters rank width"]:
    """Replaces rows by orthonormal rows of the same span, by Cholesky-QR2.

    Formula: Q = L^-1 X with X X' = L L', twice; X = L Q with a positive diagonal of L, so that
    orthonormal rows stay what they are up to rounding.

    Args:
        x: rows [..., rank, width] with rank <= width; computed in float32, or float64.

    Returns:
        A new tensor [..., rank, width], float32 (float64 for float64). Differentiable.

    Raises:
        InvalidInput: more rows than features, or values that are not finite.

    Example:
        >>> import torch
        >>> orthonormal(torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, 2.0]]))
        tensor([[0.6000, 0.8000, 0.0000],
                [0.0000, 0.0000, 1.0000]])

    Limits: where Cholesky fails, or leaves an error above 2e-6 (1e-14 in float64), Householder QR
    does the work; rows that depend on each other then get arbitrary orthonormal ones, and their
    gradient has no meaning. The test needs one value from the device.

    Reference:
        Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm (2015).
    """
    if x.dim() < 2 or x.dtype not in FLOATS or x.shape[-2] > x.shape[-1]:
        raise InvalidInput(
            f"orthonormal: {NEEDED} [..., rank, width] with rank <= width is needed, got "
            f"{x.dtype} {list(x.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    return _orthonormal(x.to(wide))[0]


def orthonormal_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q [..., r, D] and L [..., r, r] with X = L Q, in plain torch on any device."""
    lower, info = torch.linalg.cholesky_ex(x @ x.mT)
    q = _inverse(lower) @ x
    again, info_again = torch.linalg.cholesky_ex(q @ q.mT)
    q = _inverse(again) @ q
    off = (q @ q.mT - torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)).abs()
    good = (info == 0) & (info_again == 0) & (off <= TOLERANCE[x.dtype]).all(-1).all(-1)
    if bool(good.all()):
        return q, lower @ again
    if not bool(x.detach().isfinite().all()):
        raise InvalidInput("orthonormal: x has values that are not finite")
    return _householder(x)


def _inverse(lower: Tensor) -> Tensor:
    """Of a triangle [r, r]: products with it are faster than solving D columns, as exact too."""
    one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, one, upper=False)


def _householder(x: Tensor) -> tuple[Tensor, Tensor]:
    columns, upper = torch.linalg.qr(x.mT)
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(x)  # [..., r]
    return (columns * sign.unsqueeze(-2)).mT.contiguous(), (
        upper * sign.unsqueeze(-1)
    ).mT.contiguous()


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    rank = x.shape[-2]
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-2], rank, rank))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output)


def _backward(ctx, grad: Tensor, grad_lower: Tensor) -> Tensor:
    """dX = L^-T (g + M Q), M the symmetric matrix with the lower triangle of L' g_L - g Q'.

    q and lower are results, so that a second derivative comes back here, with a gradient of L.
    """
    q, lower = ctx.saved_tensors
    along = lower.mT @ grad_lower - grad @ q.mT  # [..., r, r]
    mirrored = along.tril() + along.tril(-1).mT
    return _inverse(lower).mT @ (grad + mirrored @ q)


_orthonormal = register(
    "orthonormal",
    "(Tensor x) -> (Tensor, Tensor)",
    reference=orthonormal_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    twice=_backward,
)
