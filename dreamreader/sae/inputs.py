"""How rows are normalised before they are encoded, and restored after."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.errors import InvalidInput

NORMALISATIONS = ("none", "average_norm", "standardise", "constant_norm", "layer_norm")
PER_ROW = ("constant_norm", "layer_norm")
RESHAPES = ("none", "hook_z")
_LAYER_NORM_EPS = 1e-5


class Affine(NamedTuple):
    """z = (x - shift) * scale, and back x = z * back + shift; 1 / scale where back is None.

    Each is float32, [d_in], or [rows, 1] where rows have their own; so is what comes out, or wider.
    """

    shift: Tensor
    scale: Tensor
    back: Tensor | None = None

    def apply(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        return (x - self.shift) * self.scale

    def undo(self, z: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        return (z / self.scale if self.back is None else z * self.back) + self.shift


def row_affine(kind: str, x: Float[Tensor, "rows d_in"]) -> Affine:
    """What `constant_norm` and `layer_norm` do to each row, float32.

    Formula: constant_norm: x sqrt(d) / |x|; layer_norm: (x - mean) / (deviation + 1e-5), with the
        deviation over d - 1, and back without the 1e-5.
    """
    rows = x.float()
    if kind == "constant_norm":
        norm = rows.norm(dim=1, keepdim=True)
        return Affine(torch.zeros_like(norm), math.sqrt(x.shape[1]) / norm.clamp(min=1e-12))
    mean = rows.mean(1, keepdim=True)
    deviation = (rows - mean).std(1, keepdim=True)
    return Affine(mean, 1 / (deviation + _LAYER_NORM_EPS), deviation)


def fit_affine(kind: str, x: Float[Tensor, "rows d_in"]) -> Affine:
    """What `average_norm` and `standardise` do to all rows, from a sample of them; float32.

    Formula: average_norm: x sqrt(d) / mean |x|; standardise: (x - mean) / deviation of each input.

    Raises:
        InvalidInput: no scale follows from these rows.
    """
    rows = x.detach().double()
    if kind == "average_norm":
        norm = float(rows.norm(dim=1).mean())
        if not (norm > 0 and math.isfinite(norm)):
            raise InvalidInput(
                f"fit_normalisation: the mean norm of {len(x)} rows is {norm}: no scale follows"
            )
        shift, scale = rows.new_zeros(x.shape[1]), math.sqrt(x.shape[1]) / norm
        return Affine(shift.float(), torch.full_like(shift, scale).float())
    if len(x) < 2 or not bool(rows.isfinite().all()):
        raise InvalidInput(
            f"fit_normalisation: {len(x)} rows have no finite deviation; give more rows, finite"
        )
    shift, deviation = rows.mean(0), rows.std(0)
    scale = torch.where(deviation > 0, 1 / deviation, 1.0)  # a constant input is only moved
    return Affine(shift.float(), scale.float())


class Layout(NamedTuple):
    """How inputs of any shape are rows: [*batch, d_in], or [*batch, heads, d_in / heads]."""

    shape: torch.Size
    d_in: int

    @property
    def batch(self) -> torch.Size:
        return self.shape[:-1] if self.shape[-1] == self.d_in else self.shape[:-2]

    def restore(self, rows: Float[Tensor, "rows d_in"]) -> Tensor:
        return rows.reshape(self.shape)


def layout_of(x: Tensor, d_in: int, reshape: str) -> Layout:
    """The layout of an input.

    Raises:
        InvalidInput: it is not of this width.
    """
    if not isinstance(x, Tensor):
        raise InvalidInput(
            f"SparseAutoencoder: x is a tensor [..., {d_in}], got {type(x).__name__}"
        )
    heads = reshape == "hook_z" and x.dim() > 1 and x.shape[-2] * x.shape[-1] == d_in
    if x.dim() == 0 or (x.shape[-1] != d_in and not heads):
        raise InvalidInput(
            f"SparseAutoencoder: x must be [..., {d_in}], got {list(x.shape)}; it was made for "
            f"activations with d_in={d_in}"
        )
    if not x.is_floating_point():
        raise InvalidInput(f"SparseAutoencoder: x must be floating point, got {x.dtype}")
    return Layout(x.shape, d_in)


def check_mask(mask: Tensor, batch: torch.Size) -> Bool[Tensor, " rows"]:
    """A mask of tokens, flat.

    Raises:
        InvalidInput: it is not boolean, or of another shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != batch:
        tensor = isinstance(mask, Tensor)
        got = f"{mask.dtype} {list(mask.shape)}" if tensor else type(mask).__name__
        raise InvalidInput(
            f"SparseAutoencoder: mask must be bool {list(batch)}, True for tokens that count, got "
            f"{got}"
        )
    return mask.reshape(-1)
