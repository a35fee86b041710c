"""What an autoencoder minimises: the squared error, and aux-k for latents that are dead."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows


@dataclass(frozen=True)
class AuxK:
    """How dead latents learn: those with the largest pre-activations rebuild what is left over.

    Formula: weight * scale * mean_i |r_i - e_i|^2 / v, with r the detached residual, e its
        reconstruction by k dead latents without bias; v = mean_i |r_i - mean r|^2 if `relative`,
        else 1; scale = min(dead / k, 1) if `scaled`, else 1. Never more than all that are dead.

    Attributes:
        weight: of the term; 0 leaves it out.
        k: dead latents of a row; half of d_in where None.
        dead_after: tokens without firing after which a latent is dead.
        relative: to the variance of the residual.
        scaled: by the share of dead latents.
        positive: only positive pre-activations take part.
        lagged: latents are judged by the batches before the present one, not by it too.

    Raises:
        InvalidInput: a value cannot be right.

    Reference:
        Gao et al., arXiv:2406.04093, appendix A.2; `BatchTopKTrainer` of dictionary_learning 0.1;
        `TopKTrainingSAE` of SAELens 6.54.
    """

    weight: float = 1 / 32
    k: int | None = None
    dead_after: int = 10_000_000
    relative: bool = True
    scaled: bool = False
    positive: bool = True
    lagged: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.weight, int | float) and self.weight >= 0):
            raise InvalidInput(f"AuxK: weight is at least 0, got {self.weight!r}")
        for name, value in (("k", self.k), ("dead_after", self.dead_after)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value > 0):
                raise InvalidInput(f"AuxK: {name} is at least 1, got {value!r}")


AUX_RULES = {
    "none": AuxK(weight=0.0),
    "dictionary_learning": AuxK(),
    # dead after more than 1000 steps, of 1024 rows where nobody says otherwise
    "saelens": AuxK(
        1.0, dead_after=1001 * 1024, relative=False, scaled=True, positive=False, lagged=True
    ),
}


@dataclass(frozen=True, eq=False)
class SaeLoss:
    """The loss of a batch, and what a step has to remember of it.

    Attributes:
        total: what is minimised, with its graph.
        mse: squared error of the whole autoencoder, summed over inputs, mean over rows.
        aux: the aux-k term with its weight.
        fvu: share of the variance of the rows that is not explained.
        l0: mean number of active latents of a row.
        dead: share of latents that are dead.
        groups: mse of each prefix of a Matryoshka autoencoder, [groups]; [1] without.
        fired: bool [d_sae], which latents were active.
        smallest: as `find_smallest` gives it. tokens: rows of the batch.
        penalty: of active latents, where thresholds learn.
    """

    total: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    dead: Float[Tensor, ""]
    groups: Float[Tensor, " groups"]
    fired: Bool[Tensor, " d_sae"]
    smallest: Float[Tensor, ""]
    tokens: int
    penalty: Float[Tensor, ""] | None = None


def squared_error(
    x: Float[Tensor, "rows d_in"], other: Float[Tensor, "rows d_in"]
) -> Float[Tensor, ""]:
    """Summed over inputs, mean over rows, in at least float32."""
    return (widen(x) - widen(other)).square().sum(1).mean()


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@torch.no_grad()
def fraction_unexplained(
    x: Float[Tensor, "rows d_in"], mse: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """The share of the variance of rows that such an error leaves."""
    return mse / squared_error(x, widen(x).mean(0))


def residual_error(
    rule: AuxK, d_in: int, dead: int, residual: Tensor, rebuilt: Tensor
) -> Float[Tensor, ""]:
    """The term of aux-k, with its weight.

    Args:
        dead: how many latents are. residual: detached. rebuilt: from dead latents, without bias.
    """
    error = squared_error(residual, rebuilt) * rule.weight
    if rule.scaled:
        error = error * min(dead / (rule.k or max(1, d_in // 2)), 1.0)
    if rule.relative:
        variance = squared_error(residual, widen(residual).mean(0))
        error = (error / variance).nan_to_num(0.0)
    return error


def split_columns(codes: SparseRows, widths: tuple[int, ...]) -> list[SparseRows]:
    """The entries of each band of columns; waits for a GPU.

    Args:
        widths: where bands end, ascending; the last is the width of the codes.

    Returns:
        One for each band, in the columns of the whole.
    """
    found, row, start = [], codes.row_of(), 0
    for end in widths:
        chosen = ((codes.columns >= start) & (codes.columns < end)).nonzero().squeeze(1)
        counts = torch.bincount(row[chosen], minlength=codes.rows)
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        values = codes.values[chosen]
        found.append(SparseRows(row_ptr, codes.columns[chosen], values, codes.width))
        start = end
    return found
