"""Maps of single rows: everything that is linear, and an MLP with one hidden layer."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap, CastTensors, check_matrix, check_shape


@dataclass(frozen=True, eq=False, repr=False)
class AffineMap(ActivationMap, form="affine"):
    """y = W x + b: what identity, Procrustes, ridge, reduced rank and anchors give.

    Attributes:
        weight: W [d_target, d_source]. bias: b [d_target].

    Example:
        >>> double = AffineMap(torch.zeros(2), 2 * torch.eye(2), torch.ones(2))
        >>> double.apply(torch.tensor([[1.0, 2.0]])), double.direction(torch.tensor([1.0, 0.0]))
        (tensor([[3., 5.]]), tensor([2., 0.]))
    """

    weight: Float[Tensor, "d_target d_source"]
    bias: Float[Tensor, " d_target"]
    _cast: CastTensors = field(default_factory=CastTensors, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        check_shape("AffineMap", "source_mean", self.source_mean, len(self.source_mean))
        check_matrix("AffineMap", "weight", self.weight, self.d_source)
        check_shape("AffineMap", "bias", self.bias, len(self.weight))

    @property
    def d_target(self) -> int:
        return len(self.weight)

    def apply(
        self,
        x: Float[Tensor, "*batch d_source"],
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        self.check(x)
        weight = self._cast.get("weight", self.weight, x)
        return linear(x, weight, self._cast.get("bias", self.bias, x))

    def direction(
        self,
        v: Float[Tensor, "*batch d_source"],
        at: Float[Tensor, "*place d_source"] | None = None,
        alpha: float = 1.0,
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        """W (alpha v), the same everywhere."""
        self.check_direction(v, at, alpha)
        return linear(alpha * v.double(), self.weight.to(v.device, torch.float64)).to(v.dtype)

    @property
    def rank(self) -> int:
        """Of W, as exactly as its type tells."""
        size = torch.finfo(self.weight.dtype).eps * max(self.weight.shape)
        return int(torch.linalg.matrix_rank(self.weight.double(), rtol=size))

    def inverse(self) -> "AffineMap":
        """x = W^-1 (y - b).

        Raises:
            InvalidInput: widths are not equal, or W has not full rank.
        """
        rank = self.rank
        if self.d_source != self.d_target or rank < self.d_source:
            raise InvalidInput(
                f"{self.name}: an inverse needs equal widths and full rank, it leads from "
                f"{self.d_source} to {self.d_target} features with rank {rank}; fit a map from the "
                "target to the source"
            )
        back = torch.linalg.inv(self.weight.double())
        bias = self.bias.double()
        mean = linear(self.source_mean.double(), self.weight.double(), bias)
        values = mean, back, -(back @ bias)
        made = (each.to(self.weight.dtype) for each in values)
        return AffineMap(*made, card=self.card.inverted())


@dataclass(frozen=True, eq=False, repr=False)
class MLPMap(ActivationMap, form="mlp"):
    """y = W_2 relu(W_1 x + b_1) + b_2.

    Attributes:
        weight_in: W_1 [hidden, d_source]. bias_in: b_1 [hidden].
        weight_out: W_2 [d_target, hidden]. bias_out: b_2 [d_target]; 0 in the original.

    Reference:
        Activation space interventions can be transferred between large language models,
        arXiv:2503.04429.
    """

    weight_in: Float[Tensor, "hidden d_source"]
    bias_in: Float[Tensor, " hidden"]
    weight_out: Float[Tensor, "d_target hidden"]
    bias_out: Float[Tensor, " d_target"]
    _cast: CastTensors = field(default_factory=CastTensors, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        check_shape("MLPMap", "source_mean", self.source_mean, len(self.source_mean))
        check_matrix("MLPMap", "weight_in", self.weight_in, self.d_source)
        check_shape("MLPMap", "bias_in", self.bias_in, len(self.weight_in))
        check_matrix("MLPMap", "weight_out", self.weight_out, len(self.weight_in))
        check_shape("MLPMap", "bias_out", self.bias_out, len(self.weight_out))

    @property
    def d_target(self) -> int:
        return len(self.weight_out)

    @property
    def hidden(self) -> int:
        """Width of the layer between."""
        return len(self.weight_in)

    def apply(
        self,
        x: Float[Tensor, "*batch d_source"],
        *,
        step: int | Tensor | None = None,
        level: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch d_target"]:
        self.check(x)
        names = ("weight_in", "bias_in", "weight_out", "bias_out")
        first, one, second, other = (self._cast.get(name, getattr(self, name), x) for name in names)
        return linear(linear(x, first, one).relu(), second, other)
