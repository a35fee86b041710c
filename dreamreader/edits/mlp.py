"""Mlp: a small MLP as a value, the probe by which activations are guided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.edits.base import check_finite
from dreamreader.engine import EditContext, same
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops.guide import ACTIVATIONS, MAX_LAYERS, activate

NOISE_FEATURES = 3


@dataclass(frozen=True, eq=False)
class Mlp:
    """A MLP of one to three linear layers that gives a logit for each label.

    Formula: z = W_n act(.. act(W_1 h + b_1 + C phi) ..) + b_n, phi = [f, f^2, f^3] with the share
    f of the denoising trajectory that is done (0 at pure noise).

    Args:
        weights: of each layer, [outputs, inputs]; kept without gradients.
        biases: one for each layer, [outputs].
        activation: between layers, `relu`, `gelu` (exact) or `silu`.
        labels: name of each logit; none means that labels are known by their index alone.
        steps: the denoising steps that it holds for; all by default.
        noise: C, [outputs of the first layer, 3], by which it hears how far denoising is.

    Raises:
        InvalidInput: shapes that do not fit, values that are not finite, labels that repeat or are
            not one for each logit.
        UnknownName: of the activation.

    Example:
        >>> probe = Mlp([torch.eye(2)], [torch.zeros(2)], labels=("red", "blue"))
        >>> probe.logits(torch.tensor([[1.0, 3.0]])).tolist()
        [[1.0, 3.0]]
    """

    weights: Sequence[Float[Tensor, "outputs inputs"]]
    biases: Sequence[Float[Tensor, " outputs"]]
    activation: str = "relu"
    labels: Sequence[str] = ()
    steps: Sequence[int] | None = None
    noise: Float[Tensor, "outputs 3"] | None = None

    def __post_init__(self):
        keep = object.__setattr__  # frozen; sequences become tuples, tensors lose their gradients
        for name in ("weights", "biases"):
            keep(self, name, tuple(each.detach() for each in getattr(self, name)))
        keep(self, "labels", tuple(self.labels))
        if self.steps is not None:
            keep(self, "steps", tuple(self.steps))
        if self.noise is not None:
            keep(self, "noise", self.noise.detach())
        self._check_layers()
        if self.activation not in ACTIVATIONS:
            raise UnknownName("activation of a probe", self.activation, ACTIVATIONS)
        if self.labels and (
            len(set(self.labels)) < len(self.labels) or len(self.labels) != len(self)
        ):
            raise InvalidInput(
                f"Mlp: {len(self)} different labels are needed, one for each logit, got "
                f"{', '.join(self.labels)}"
            )
        if self.noise is not None and self.noise.shape != (len(self.biases[0]), NOISE_FEATURES):
            wanted = [len(self.biases[0]), NOISE_FEATURES]
            raise InvalidInput(f"Mlp: noise must be {wanted}, got {list(self.noise.shape)}")

    def __len__(self) -> int:
        """Number of logits."""
        return len(self.weights[-1])

    @property
    def width(self) -> int:
        """Features that it reads."""
        return self.weights[0].shape[1]

    @property
    def changes_with_step(self) -> bool:
        return self.steps is not None or self.noise is not None

    def first_bias(self, fraction: float | Float[Tensor, "*batch"] | None) -> Tensor:
        """b_1 + C phi, [*batch, outputs].

        Raises:
            InvalidInput: it hears of the noise level, and the share of the trajectory is unknown.
        """
        if self.noise is None:
            return self.biases[0]
        if fraction is None:
            raise InvalidInput("Mlp: it is conditioned on the noise level, fraction is needed")
        f = torch.as_tensor(fraction, dtype=self.noise.dtype, device=self.noise.device)
        if not bool(f.detach().isfinite().all()):
            raise InvalidInput("Mlp: it is conditioned on the noise level, which is unknown here")
        phi = f.unsqueeze(-1) ** torch.arange(1, 1 + NOISE_FEATURES, device=f.device)  # [*batch, 3]
        return self.biases[0] + phi @ self.noise.T

    def logits(
        self,
        h: Float[Tensor, "*batch width"],
        fraction: float | Float[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch labels"]:
        """Logits of activations, computed in the dtype of the weights.

        Args:
            h: rows of any shape whose last dimension has `width` features.
            fraction: share of the trajectory that is done, one for all or one for each row; needed
                where the MLP is conditioned on the noise level.
        """
        h = h.to(self.weights[0])
        biases = (self.first_bias(fraction), *self.biases[1:])
        for weight, bias in zip(self.weights[:-1], biases[:-1], strict=True):
            h = activate(h @ weight.T + bias, self.activation)[0]
        return h @ self.weights[-1].T + biases[-1]

    def after(self, weight: Float[Tensor, "width inputs"], bias: Float[Tensor, " width"]) -> "Mlp":
        """The MLP of y that gives what this gives of weight y + bias.

        Formula: W_1 <- W_1 G and b_1 <- b_1 + W_1 g, in float64, with G the weight and g the bias.

        Raises:
            InvalidInput: the affine map gives another width.

        Example:
            >>> own = Mlp([torch.eye(2)], [torch.zeros(2)])
            >>> own.after(torch.ones(2, 3), torch.tensor([1.0, 0.0])).logits(torch.ones(3)).tolist()
            [4.0, 3.0]
        """
        if weight.shape[0] != self.width or bias.shape != weight.shape[:1]:
            raise InvalidInput(
                f"Mlp: it reads {self.width} features, the map before it has a weight "
                f"{list(weight.shape)} and a bias {list(bias.shape)}"
            )
        first = self.weights[0].double()
        own = (first @ weight.to(first), self.biases[0].double() + first @ bias.to(first))
        one, other = (each.to(self.weights[0].dtype) for each in own)
        return replace(self, weights=(one, *self.weights[1:]), biases=(other, *self.biases[1:]))

    def __eq__(self, other: object) -> bool:
        return same(self, other) if isinstance(other, Mlp) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.activation, self.labels, tuple(each.shape for each in self.weights)))

    def _check_layers(self) -> None:
        counts = f"{len(self.weights)} weights and {len(self.biases)} biases"
        if not 1 <= len(self.weights) <= MAX_LAYERS or len(self.biases) != len(self.weights):
            raise InvalidInput(f"Mlp: 1 to {MAX_LAYERS} layers, each with a bias; got {counts}")
        inputs = self.weights[0].shape[-1]
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if weight.dim() != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
                raise InvalidInput(
                    f"Mlp: layer {n} gets {inputs} features, its weight is {list(weight.shape)} "
                    f"and its bias {list(bias.shape)}"
                )
            check_finite(f"Mlp: weight of layer {n}", weight)
            check_finite(f"Mlp: bias of layer {n}", bias)
            inputs = len(weight)
        if self.noise is not None:
            check_finite("Mlp: noise", self.noise)


def at_step(probe: Mlp | Sequence[Mlp], place: EditContext) -> Mlp:
    """The MLP that holds for the running step.

    Of several, the one whose `steps` has it; without `steps`, entry i holds for step i.

    Raises:
        InvalidInput: none holds for the step, or the step is unknown.
    """
    if isinstance(probe, Mlp):
        if probe.steps is None:
            return probe
        probe = [probe]
    elif all(each.steps is None for each in probe):
        return probe[place.step_of(len(probe), "probe")]
    step = None if place.instant is None else place.instant.step
    for each in probe:
        if each.steps is not None and step in each.steps:
            return each
    there = sorted(step for each in probe for step in each.steps or ())
    raise InvalidInput(
        f"probe at {place.site}: holds for steps {', '.join(map(str, there))}, the running step is "
        f"{'unknown' if step is None else step}"
    )


def mlps(probe: object) -> list[Mlp]:
    """Every MLP in a probe: itself, those of its steps, those of its sites."""
    if isinstance(probe, Mlp):
        return [probe]
    if isinstance(probe, Mapping):
        return [found for each in probe.values() for found in mlps(each)]
    if isinstance(probe, Sequence):
        return [found for each in probe for found in mlps(each)]
    return []
