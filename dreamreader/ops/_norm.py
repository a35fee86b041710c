"""Norms of rows, with derivatives."""

import torch
from torch import Tensor


def row_norm(x: Tensor) -> Tensor:
    """[..., 1]: Euclidean norm of rows; a row of zeros has derivatives of 0.

    torch's own norm has that in the first derivative, and NaN in the second.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = (x == 0).all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(torch.where(zero, 1, x), dim=-1, keepdim=True)
    return torch.where(zero, 0, norm)
