"""Training of probes on rows at hand: Adam on standardised rows, the best validated state kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.edits.mlp import Mlp
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.fitting import History, NonFiniteLoss, Recipe, fit
from dreamreader.ops.guide import ACTIVATIONS
from dreamreader.probes.labels import Targets
from dreamreader.probes.net import StackedMlps
from dreamreader.probes.objective import ProbeObjective
from dreamreader.probes.scores import Held
from dreamreader.probes.split import HELD_OUT, TRAIN, VALIDATION


@dataclass(frozen=True)
class Design:
    """The shape of probes, and what is done to their inputs.

    Attributes:
        hidden: widths of none to two hidden layers; () is linear.
        jitter: deviation of noise that is added to raw inputs in training and validation, the same
            in all directions, as a multiple of the root mean square of the features' deviations.
    """

    hidden: tuple[int, ...]
    activation: str
    jitter: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if len(self.hidden) > 2 or any(each < 1 for each in self.hidden):
            raise InvalidInput(f"hidden: none to two widths from 1, got {self.hidden}")
        if self.activation not in ACTIVATIONS:
            raise UnknownName("activation of a probe", self.activation, ACTIVATIONS)
        if not self.jitter >= 0:
            raise InvalidInput(f"jitter must be 0 or more, got {self.jitter}")


def recipe_of(epochs: int, patience: int, lr: float, batch_size: int, seed: int) -> Recipe:
    """How probes are trained: Adam at one rate, validated after every epoch."""
    given = {"epochs": epochs, "patience": patience, "lr": lr, "batch_size": batch_size}
    for name, value in given.items():
        if not value > 0:
            raise InvalidInput(f"{name} must be positive, got {value}")
    fixed: dict[str, Any] = {"optimizer": "Adam", "schedule": "constant", "validate_every": None}
    return Recipe(seed=seed, **given, **fixed)  # pyright: ignore[reportArgumentType]


def describe_training(design: Design, recipe: Recipe) -> dict[str, Any]:
    """What a card says of a training."""
    names = ("epochs", "patience", "lr", "batch_size", "seed")
    return {
        "hidden": list(design.hidden),
        "activation": design.activation,
        **{name: getattr(recipe, name) for name in names},
        "jitter": design.jitter,
    }


@dataclass(frozen=True)
class Problem:
    """Rows of one or several probes that are trained side by side, each on rows of its own.

    Attributes:
        x: raw rows, for each probe.
        fraction: share of the trajectory done, of each row.
        part: TRAIN, VALIDATION or HELD_OUT. group: number of each row's group.
        noisy: whether the probe is conditioned on the fraction.
        steps: of each probe, None where one serves all.
    """

    x: Float[Tensor, "count rows features"]
    targets: Targets
    fraction: Float[Tensor, " rows"]
    part: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    objective: ProbeObjective
    noisy: bool
    design: Design
    recipe: Recipe
    steps: tuple[int, ...] | None = None

    def replace(self, **fields: Any) -> "Problem":
        return replace(self, **fields)

    def rows(self, part: int) -> Int[Tensor, " n"]:
        return (self.part == part).nonzero().flatten()


@dataclass(frozen=True)
class TrainedMlps:
    """MLPs on raw rows, and what they tell of rows that did not train them (on the CPU).

    Attributes:
        epochs: the epoch whose state was kept, of each.
    """

    mlps: tuple[Mlp, ...]
    validation: Held
    held_out: Held
    epochs: tuple[int, ...]


@torch.inference_mode(False)
def train(problem: Problem) -> TrainedMlps:
    """Trains the MLPs of a problem.

    Inputs (and the numbers of a regression) are standardised by the rows to train on, and this is
    folded into the first (and last) layer afterwards. After every epoch each MLP is
    validated; its best state is kept, the untrained one never.
    """
    design, rows, proof = problem.design, problem.rows(TRAIN), problem.rows(VALIDATION)
    x, mean, scale = standardise(problem.x, rows)
    targets, middle, spread = problem.targets, 0.0, 1.0
    if problem.objective.task.kind == "regress":
        middle, spread = spread_of(targets[rows])
        targets = (targets - middle) / spread
    labels = problem.objective.task.labels
    sizes = (x.shape[2], *design.hidden, len(labels))
    seed = problem.recipe.seed
    net = StackedMlps(len(x), sizes, design.activation, problem.noisy, seed).to(x.device)
    generator = torch.Generator().manual_seed(seed)
    rms = scale.square().mean(-1, keepdim=True).sqrt()
    noise = (design.jitter * rms / scale).unsqueeze(1)  # [count, 1, features]
    proven = _add_jitter(x[:, proof], noise, generator)

    def batches(epoch: int) -> Iterator[TrainingRows]:
        order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        for batch in order.split(problem.recipe.batch_size):
            seen = _add_jitter(x[:, batch], noise, generator)
            yield TrainingRows(seen, targets[batch], problem.fraction[batch])

    def validate() -> Tensor:
        found = net(proven, problem.fraction[proof])
        return problem.objective.losses(found, targets[proof])

    history = train_nets(net, problem.objective, batches, problem.recipe, validate)
    mlps = net.fold(mean, scale, labels, problem.steps, middle, spread)
    held = [
        _hold_out(problem, each, net(x[:, each], problem.fraction[each]).detach() * spread + middle)
        for each in (proof, problem.rows(HELD_OUT))
    ]
    return TrainedMlps(mlps, held[0], held[1], epochs_of(history))


@dataclass(frozen=True)
class TrainingRows:
    """Standardised rows of a step of training; slot: the MLPs that they are for."""

    x: Float[Tensor, "count rows features"]
    targets: Targets
    fraction: Float[Tensor, " rows"]
    slot: int = 0


def train_nets(
    nets: Any,
    objective: ProbeObjective,
    batches: Callable[[int], Iterable[TrainingRows]],
    recipe: Recipe,
    validate: Callable[[], Any],
) -> Any:
    """Trains MLPs, or several of them by slot; none depends on the others.

    Raises:
        InvalidInput: a loss is not finite.
    """

    def loss_of(slot: int) -> Callable[[StackedMlps, TrainingRows], Tensor | None]:
        def loss(net: StackedMlps, rows: TrainingRows) -> Tensor | None:
            if rows.slot != slot:
                return None
            return objective.losses(net(rows.x, rows.fraction), rows.targets).sum()

        return loss

    goals: Any = loss_of(0)
    if isinstance(nets, Mapping):
        goals = {name: loss_of(slot) for slot, name in enumerate(nets)}
    try:
        return fit(
            nets, goals, batches, recipe, progress=False, validate=validate, check_every=None
        )
    except NonFiniteLoss as error:
        raise InvalidInput(
            "the loss of the probe is not finite; lower the learning rate lr"
        ) from error


def epochs_of(history: History) -> tuple[int, ...]:
    """The epoch of each slot's best state, where all epochs are validated."""
    ends = [step for step, _ in history.validation]
    return tuple(ends.index(each) for each in history.slots)


def _add_jitter(x: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Standardised inputs with noise of a deviation for each feature."""
    if not bool((noise != 0).any()):
        return x
    return x + noise * torch.randn(x.shape, generator=generator).to(x)


def _hold_out(problem: Problem, rows: Tensor, logits: Float[Tensor, "count rows outputs"]) -> Held:
    count = len(logits)
    targets, group = problem.targets[rows].cpu(), problem.group[rows].cpu()
    slot = torch.arange(count).repeat_interleave(len(rows))
    repeated = targets.repeat(count, 1), group.repeat(count)
    return Held(logits.flatten(0, 1).cpu(), *repeated, slot)


def standardise(
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
