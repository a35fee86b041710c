"""From rows to sparse codes: the encoder product together with a selection."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dreamreader.ops import (
    SparseRows,
    choose_pool,
    column_scores,
    encode_select,
    sparse_column_sums,
    sparse_decode,
    sparse_outer,
)
from dreamreader.sae.loss import AuxK
from dreamreader.sae.selection import BatchTopK, SampledTopK, TopK

_BLOCK = 1 << 24  # numbers of a block of pre-activations that are scored at once


@dataclass(frozen=True)
class FixedEncoder:
    """What a step selects with: no gradients, in the dtype of computing.

    Attributes:
        rows: centred. weight, bias: of the encoder, times norms.
        norms: of decoder rows, float32 or more; None where nothing is scaled.
    """

    rows: Float[Tensor, "rows d_in"]
    weight: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]
    norms: Float[Tensor, " d_sae"] | None


def attach_gradients(
    kept: SparseRows,
    encoder: FixedEncoder,
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    center: Float[Tensor, " d_in"] | None,
) -> SparseRows:
    """What was kept as the decoder takes it: not scaled, and with gradients of its entries alone.

    Formula: <x_i - center, w_f> + b_f at the places (i, f). A selection on these times |W_dec_f|
        reconstructs with these values, so norms have no gradient, and no dense matrix has one.

    Args:
        kept: selected by the fixed encoder. x: rows before they were centred.
        weight, bias, center: parameters in their own dtype; None where nothing centres rows.
    """
    values = kept.values
    if encoder.norms is not None:
        at = encoder.norms[kept.columns.clamp(min=0).long()]
        values = (values / at).to(values.dtype)
    found = _KeptValues.apply(
        replace(kept, values=values), encoder.rows, values, x, weight, bias, center
    )
    return replace(kept, values=found, threshold=None)


class _KeptValues(torch.autograd.Function):
    """Values that are known already, with the gradients of `attach_gradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        codes: SparseRows,
        rows: Tensor,
        values: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        center: Tensor | None,
    ) -> Tensor:
        ctx.codes, ctx.center = codes, None if center is None else center.dtype
        ctx.types = x.dtype, bias.dtype
        ctx.save_for_backward(rows, weight)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        codes, needed = replace(ctx.codes, values=grad), ctx.needs_input_grad
        d_x = sparse_decode(codes, weight, dtype=ctx.types[0]) if needed[3] else None
        d_weight = sparse_outer(codes, rows, dtype=weight.dtype) if needed[4] else None
        sums = sparse_column_sums(codes, dtype=weight.dtype)
        d_center = (sums @ weight).neg().to(ctx.center) if needed[6] else None
        return None, None, None, d_x, d_weight, sums.to(ctx.types[1]), d_center


def encode_budget(
    rows: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    selection: TopK | BatchTopK | SampledTopK,
    pool: Int[Tensor, " pool"] | None = None,
) -> SparseRows:
    """The codes that a selection with a budget keeps; rows are normalised and centred.

    Args:
        pool: columns that take part, ascending; all where None.
    """
    if isinstance(selection, TopK):
        return encode_select(rows, weight, bias, rule="topk", count=selection.k, pool=pool)
    count = selection.budget(len(rows))
    return encode_select(rows, weight, bias, rule="batch_topk", count=count, pool=pool)


def encode_above(
    rows: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> SparseRows:
    """The codes that are positive and above the threshold of their latent."""
    return encode_select(rows, weight, bias, rule="threshold", threshold=threshold.clamp(min=0))


@torch.no_grad()
def draw_pool(
    selection: SampledTopK,
    rows: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    step: int,
) -> Int[Tensor, " pool"]:
    """The columns of a batch that take part, int32 and ascending.

    Args:
        step: which, with the seed of the selection, gives what `sampled` draws.
    """
    generator = torch.Generator(rows.device).manual_seed(((selection.seed << 32) + step) % 2**63)
    scores = _score_columns(selection.score, rows, weight, bias)
    return choose_pool(scores, selection.pool_size(len(weight)), selection.rule, generator)


def _score_columns(score: str, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Scores of all columns; pre-activations are there in blocks of columns, but for leverage."""
    if score == "uniform":
        return torch.ones(len(weight), device=weight.device)
    step = max(1, len(weight) if score == "leverage" else _BLOCK // max(1, len(rows)))
    return torch.cat(
        [
            column_scores(torch.addmm(some, rows, part.T), score)
            for part, some in zip(weight.split(step), bias.split(step), strict=True)
        ]
    )


def encode_dead(
    rule: AuxK,
    rows: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    dead: Int[Tensor, " dead"],
) -> SparseRows:
    """The largest pre-activations of dead latents in each row, as aux-k takes them.

    Args:
        dead: columns, int32 and ascending; at least one.
    """
    k = min(rule.k or max(1, rows.shape[1] // 2), len(dead))
    if rule.positive:
        return encode_select(rows, weight, bias, rule="topk", count=k, pool=dead)
    chosen = dead.long()
    values = torch.addmm(bias[chosen], rows, weight[chosen].T)
    place = values.detach().topk(k, sorted=False).indices.sort(1).values
    row_ptr = torch.arange(len(rows) + 1, device=rows.device) * k
    columns = dead[place.flatten()]
    return SparseRows(row_ptr, columns, values.gather(1, place).flatten(), len(weight))
