"""Training of probes on rows at hand: Adam on standardised rows, the best validated state kept."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.edits.mlp import Mlp
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops.guide import ACTIVATIONS
from dreamreader.probes.labels import Targets
from dreamreader.probes.net import Perceptrons
from dreamreader.probes.objective import Objective
from dreamreader.probes.scores import Held
from dreamreader.probes.split import HELD_OUT, TRAIN, VALIDATION


@dataclass(frozen=True)
class Recipe:
    """How probes are trained.

    Attributes:
        hidden: widths of none to two hidden layers; () is linear.
        epochs: at most so many. patience: epochs without a better validated state before it stops.
        jitter: deviation of noise that is added to raw inputs in training and validation, the same
            in all directions, as a multiple of the root mean square of the features' deviations.
    """

    hidden: tuple[int, ...]
    activation: str
    epochs: int
    patience: int
    lr: float
    batch_size: int
    seed: int
    jitter: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if len(self.hidden) > 2 or any(each < 1 for each in self.hidden):
            raise InvalidInput(f"hidden: none to two widths from 1, got {self.hidden}")
        if self.activation not in ACTIVATIONS:
            raise UnknownName("activation of a probe", self.activation, ACTIVATIONS)
        for name in ("epochs", "patience", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name} must be positive, got {getattr(self, name)}")
        if not self.jitter >= 0:
            raise InvalidInput(f"jitter must be 0 or more, got {self.jitter}")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hidden": list(self.hidden)}


@dataclass(frozen=True)
class Problem:
    """Rows of one or several probes that are trained side by side, each on rows of its own.

    Attributes:
        x: raw rows, for each probe.
        fraction: share of the trajectory done, of each row.
        part: TRAIN, VALIDATION or HELD_OUT. group: number of each row's group.
        noisy: whether the probe hears of the fraction.
        steps: of each probe, None where one serves all.
    """

    x: Float[Tensor, "count rows features"]
    targets: Targets
    fraction: Float[Tensor, " rows"]
    part: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    objective: Objective
    noisy: bool
    recipe: Recipe
    steps: tuple[int, ...] | None = None

    def changed(self, **fields: Any) -> "Problem":
        return replace(self, **fields)

    def rows(self, part: int) -> Int[Tensor, " n"]:
        return (self.part == part).nonzero().flatten()


@dataclass(frozen=True)
class Trained:
    """Perceptrons on raw rows, and what they tell of rows that did not train them (on the CPU).

    Attributes:
        epochs: the epoch whose state was kept, of each.
    """

    mlps: tuple[Mlp, ...]
    validation: Held
    held_out: Held
    epochs: tuple[int, ...]


@torch.inference_mode(False)
def train(problem: Problem) -> Trained:
    """Trains the perceptrons of a problem.

    Inputs (and the numbers of a regression) are standardised by the rows to train on, and this is
    folded into the first (and last) layer afterwards. After every epoch each perceptron is
    validated; its best state is kept, the untrained one never.
    """
    recipe, rows = problem.recipe, problem.rows(TRAIN)
    x, mean, scale = standardised(problem.x, rows)
    targets, middle, spread = problem.targets, 0.0, 1.0
    if problem.objective.task.kind == "regress":
        middle, spread = spread_of(targets[rows])
        targets = (targets - middle) / spread
    outputs = len(problem.objective.task.labels)
    sizes = (x.shape[2], *recipe.hidden, outputs)
    net = Perceptrons(len(x), sizes, recipe.activation, problem.noisy, recipe.seed).to(x.device)
    keep = Best(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.lr)
    generator = torch.Generator().manual_seed(recipe.seed)
    proof = problem.rows(VALIDATION)
    rms = scale.square().mean(-1, keepdim=True).sqrt()
    noise = (recipe.jitter * rms / scale).unsqueeze(1)  # [count, 1, features]
    proven = _jittered(x[:, proof], noise, generator)
    for epoch in range(recipe.epochs):
        order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        for batch in order.split(recipe.batch_size):
            seen = _jittered(x[:, batch], noise, generator)
            step(net, optimiser, problem.objective, seen, targets[batch],
                 problem.fraction[batch])  # fmt: skip
        with torch.no_grad():
            found = net(proven, problem.fraction[proof])
            keep.offer(epoch, problem.objective.losses(found, targets[proof]))
        if keep.waited(epoch) >= recipe.patience:
            break
    keep.restore()
    labels = problem.objective.task.labels
    mlps = net.folded(mean, scale, labels, problem.steps, middle, spread)
    held = [
        _held(problem, each, net(x[:, each], problem.fraction[each]).detach() * spread + middle)
        for each in (proof, problem.rows(HELD_OUT))
    ]
    return Trained(mlps, held[0], held[1], keep.epochs())


def _jittered(x: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Standardised inputs with noise of a deviation for each feature."""
    if not bool((noise != 0).any()):
        return x
    return x + noise * torch.randn(x.shape, generator=generator).to(x)


def _held(problem: Problem, rows: Tensor, logits: Float[Tensor, "count rows outputs"]) -> Held:
    count = len(logits)
    targets, group = problem.targets[rows].cpu(), problem.group[rows].cpu()
    slot = torch.arange(count).repeat_interleave(len(rows))
    repeated = targets.repeat(count, 1), group.repeat(count)
    return Held(logits.flatten(0, 1).cpu(), *repeated, slot)


def step(
    net: Perceptrons,
    optimiser: torch.optim.Optimizer,
    objective: Objective,
    x: Tensor,
    targets: Targets,
    fraction: Tensor,
) -> None:
    """One step down the sum of the perceptrons' losses: none hears of the others.

    Raises:
        InvalidInput: the loss is not finite.
    """
    with torch.enable_grad():
        loss = objective.losses(net(x, fraction), targets).sum()
        optimiser.zero_grad()
        loss.backward()
    if not bool(loss.isfinite()):
        raise InvalidInput("the loss of the probe is not finite; lower the learning rate lr")
    optimiser.step()


class Best:
    """Keeps the state of each perceptron that validated best, from the first epoch on."""

    def __init__(self, net: Perceptrons):
        self.net = net
        self.states = [each.detach().clone() for each in net.parameters()]
        count = len(self.states[0])
        self.losses = torch.full((count,), torch.inf, device=self.states[0].device)
        self.epoch = torch.full((count,), -1)

    def offer(self, epoch: int, losses: Float[Tensor, " count"]) -> None:
        better = losses < self.losses
        self.losses = torch.where(better, losses, self.losses)
        self.epoch[better.cpu()] = epoch
        for kept, now in zip(self.states, self.net.parameters(), strict=True):
            kept[better] = now.detach()[better]

    def waited(self, epoch: int) -> int:
        """Epochs since the latest better state of any."""
        return epoch - int(self.epoch.max())

    def epochs(self) -> tuple[int, ...]:
        return tuple(self.epoch.tolist())

    @torch.no_grad()
    def restore(self) -> None:
        for kept, now in zip(self.states, self.net.parameters(), strict=True):
            now.copy_(kept)


def standardised(
    x: Float[Tensor, "count rows features"], rows: Int[Tensor, " n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """x with mean 0 and deviation 1 over some rows; mean and deviation [count, features].

    A feature that does not vary keeps its scale.
    """
    own = x[:, rows]
    mean, scale = own.mean(1), own.std(1, correction=0)
    scale = torch.where(scale > 1e-6 * own.abs().amax(1), scale, torch.ones_like(scale))
    return (x - mean.unsqueeze(1)) / scale.unsqueeze(1), mean, scale


def spread_of(targets: Float[Tensor, "rows outputs"]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each output; 1 where it does not vary."""
    mean, scale = targets.mean(0), targets.std(0, correction=0)
    return mean, torch.where(scale > 0, scale, torch.ones_like(scale))
