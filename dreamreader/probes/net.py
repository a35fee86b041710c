"""MLPs that are trained side by side, one for each step, on standardised inputs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamreader.edits.mlp import Mlp

_FUNCTIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class StackedMlps(nn.Module):
    """`count` MLPs of one shape; inputs, weights and logits have them in dimension 0.

    Args:
        sizes: features, hidden widths, outputs.
        noisy: whether the first layer is conditioned on the noise level.
    """

    def __init__(self, count: int, sizes: Sequence[int], activation: str, noisy: bool, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw_parameter(*shape: int, inputs: int) -> nn.Parameter:
            draw = torch.rand(count, *shape, generator=generator)
            return nn.Parameter((2 * draw - 1) * inputs**-0.5)

        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.activation = activation
        self.weights = nn.ParameterList(
            [draw_parameter(out, size, inputs=size) for size, out in pairs]
        )
        self.biases = nn.ParameterList([draw_parameter(out, inputs=size) for size, out in pairs])
        self.noise = nn.Parameter(torch.zeros(count, sizes[1], 3)) if noisy else None

    def forward(
        self, x: Float[Tensor, "count rows features"], fraction: Float[Tensor, " rows"]
    ) -> Float[Tensor, "count rows outputs"]:
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if n:
                x = _FUNCTIONS[self.activation](x)
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            if n == 0 and self.noise is not None:
                x = x + powers(fraction) @ self.noise.mT
        return x

    @torch.no_grad()
    def fold(
        self,
        mean: Float[Tensor, "count features"],
        scale: Float[Tensor, "count features"],
        labels: tuple[str, ...],
        steps: Sequence[int] | None = None,
        out_mean: Float[Tensor, " outputs"] | float = 0.0,
        out_scale: Float[Tensor, " outputs"] | float = 1.0,
    ) -> tuple[Mlp, ...]:
        """The MLPs on raw inputs: W (x - m) / s + b = (W / s) x + (b - (W / s) m).

        `out_mean` and `out_scale` undo the same of the outputs; `steps` are those of each.
        """
        weights, biases = ([e.double() for e in many] for many in (self.weights, self.biases))
        noise = None if self.noise is None else self.noise.double()
        weights[0] = weights[0] / scale.double().unsqueeze(1)
        biases[0] = biases[0] - (weights[0] @ mean.double().unsqueeze(2)).squeeze(2)
        out = torch.as_tensor(out_scale, dtype=torch.float64, device=mean.device)
        weights[-1], biases[-1] = weights[-1] * out.unsqueeze(-1), biases[-1] * out + out_mean
        if noise is not None and len(weights) == 1:
            noise = noise * out.reshape(-1, 1)
        return tuple(
            Mlp(
                tuple(each[n].float().cpu() for each in weights),
                tuple(each[n].float().cpu() for each in biases),
                self.activation,
                labels,
                steps=None if steps is None else (steps[n],),
                noise=None if noise is None else noise[n].float().cpu(),
            )
            for n in range(len(mean))
        )


def powers(fraction: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows 3"]:
    """What a first layer gets of the noise level: [f, f^2, f^3]."""
    return torch.stack([fraction, fraction**2, fraction**3], -1)
