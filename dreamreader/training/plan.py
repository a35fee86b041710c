"""The plan of adapters: sites, parameters and calls, with what they will take."""

import time
from dataclasses import dataclass, replace

from dreamreader.recording.buffer import MEMORY
from dreamreader.reft import Loss, Pairs, Reft
from dreamreader.reft.batches import Batches
from dreamreader.specs.batch import GIB, duration
from dreamreader.training.examples import Examples
from dreamreader.training.losses import AdaptedSites, adapters_of, loss_of
from dreamreader.training.parts import Training

ROWS, _STEPS = 2, 2  # that are run to learn the time


@dataclass(frozen=True)
class ReftPlan:
    """What a training will do.

    Attributes:
        widths: features by site. parameters: that are trained.
        prompts, seeds, calls: rows are prompts x seeds, each with so many calls.
        steps, batch: of the training. recording, training: estimated seconds.
        bytes: estimated memory, beside the model.
    """

    widths: dict[str, int]
    parameters: int
    prompts: int
    seeds: int
    calls: int
    steps: int
    batch: int
    recording: float
    training: float
    bytes: int

    def __repr__(self) -> str:
        listed = [f"{site}, width {width}" for site, width in self.widths.items()]
        more = [f"... {len(listed) - 12} more"] if len(listed) > 12 else []
        rows = self.prompts * self.seeds
        return "\n".join(
            [
                f"sites       {len(listed)}",
                *(f"            {each}" for each in [*listed[:12], *more]),
                f"parameters  {self.parameters:,}",
                f"rows        {rows:,}: {self.prompts:,} prompts, {self.seeds:,} seeds",
                f"calls       {rows * self.calls:,} to train on and to hold out",
                f"steps       {self.steps:,} of {self.batch} calls",
                f"memory      about {self.bytes / GIB:.2g} GiB",
                f"time        about {duration(self.recording + self.training)}, "
                f"{duration(self.recording)} of them to record",
            ]
        )


def plan_of(
    training: Training, place: AdaptedSites, examples: Examples, row_bytes: int
) -> ReftPlan:
    """Makes the plan of a training; two rows are run for two steps, and learned from twice.

    Args:
        training, examples: of the spec. place: with calls of `ROWS` rows.
        row_bytes: activations of a row; measured first, as a first run takes longer.

    Raises:
        InvalidInput, UnknownName, NeverFired: a part of the spec does not fit the subject.
    """
    recipe, reft = training.recipe, adapters_of(training, place)
    few = {} if place.steps is None else {"num_inference_steps": min(_STEPS, place.steps)}
    short, first = replace(place, settings={**(place.settings or {}), **few}), examples.few(ROWS)
    began = time.perf_counter()
    loss = loss_of(training, short, first)
    recorded = time.perf_counter() - began
    pairs = getattr(getattr(loss, "main", loss), "pairs", None)
    timed = short.steps is not None and (pairs is None or pairs.steps is not None)
    calls = loss.moments * (place.steps or 1) // (short.steps or 1) if timed else loss.moments
    share = examples.rows * calls / (loss.rows * loss.moments)
    return ReftPlan(
        widths={site: each.width for site, each in reft.adapters.items()},
        parameters=sum(each.numel() for each in reft.parameters()),
        prompts=len(examples.prompts),
        seeds=len(examples.seeds),
        calls=calls,
        steps=recipe["steps"],
        batch=recipe["batch_size"],
        recording=recorded * share,
        training=_step_seconds(loss, reft, recipe["batch_size"]) * recipe["steps"],
        bytes=2 * recipe["batch_size"] * row_bytes if pairs is None else _bytes(pairs, share),
    )


def _step_seconds(loss: Loss, reft: Reft, size: int) -> float:
    """Of the second step; the first one also makes what is kept."""
    batches, seconds = Batches(loss, size, 0.0, 0), 0.0
    with loss.ready():
        for number in range(2):
            began = time.perf_counter()
            sum(loss.terms(reft, batches[number]).values()).backward()  # pyright: ignore
            seconds = time.perf_counter() - began
    return seconds


def _bytes(pairs: Pairs, share: float) -> int:
    """Activations of all pairs; where they are many they go to a file."""
    held = sum(each.nbytes for side in (pairs.base, pairs.teacher) for each in side.values())
    return int(min(held * share, 2 * MEMORY))
