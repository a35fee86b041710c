"""Thresholds that learn: JumpReLU with straight-through gradients."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.ops import SparseRows


class _Jump(torch.autograd.Function):
    """z where z > t, else 0; t learns -t/w within a window of width w around it, z where active."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, t)
        ctx.width = width
        return torch.where(z <= t, 0.0, z)  # NaN stays

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        z, t = ctx.saved_tensors
        near = (z - t).abs() < ctx.width / 2
        return grads[0] * (z > t), torch.where(near, -t / ctx.width * grads[0], 0.0), None


class _Heaviside(torch.autograd.Function):
    """1 where z > t, else 0; t learns -1/w within the window, z nothing."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, t)
        ctx.width = width
        return (z > t).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        z, t = ctx.saved_tensors
        near = (z - t).abs() < ctx.width / 2
        return None, torch.where(near, -1 / ctx.width * grads[0], 0.0), None


def encode_near(
    rows: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    log_threshold: Float[Tensor, " d_sae"],
    width: float,
) -> tuple[SparseRows, Float[Tensor, ""]]:
    """The codes above learned thresholds, and those of 0 from which thresholds learn too.

    Formula: z where z > t, else 0, with t = exp(log_threshold); entries are those with
        z > t - width / 2. dz/dt := -(t / width) [|z - t| < width / 2], and of the count
        -(1 / width) [|z - t| < width / 2].

    Args:
        rows: normalised and centred. width: of the window, the bandwidth of the kernel.

    Returns:
        The codes, and how many are above their threshold, as a mean over rows.

    Reference:
        Rajamanoharan et al., Jumping ahead, arXiv:2407.14435, equations 9 to 12.
    """
    z = torch.addmm(bias, rows, weight.T)
    threshold = log_threshold.float().exp()
    wide = z.float()
    row, column = (~(wide <= threshold - width / 2)).nonzero(as_tuple=True)
    near, own = wide[row, column], threshold[column]
    codes = _Jump.apply(near, own, width)
    count = _Heaviside.apply(near, own, width)
    counts = torch.bincount(row, minlength=len(z))
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    assert isinstance(codes, Tensor) and isinstance(count, Tensor)
    found = SparseRows(row_ptr, column.int(), codes.to(z.dtype), len(weight))
    return found, count.sum() / len(z)


def drop_zeros(codes: SparseRows) -> SparseRows:
    """The entries that are not 0, without gradients."""
    values = codes.values.detach()
    kept = values != 0
    counts = torch.bincount(codes.row_of()[kept], minlength=codes.rows)
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseRows(row_ptr, codes.columns[kept], values[kept], codes.width)
