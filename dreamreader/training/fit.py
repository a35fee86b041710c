"""Adapters trained as a spec says, and what they reach on rows that did not train them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamreader._progress import ProgressCallback, ProgressEvent, silent
from dreamreader.reft import Batch, History, Loss, Reft, train
from dreamreader.reft.batches import Batches
from dreamreader.training.examples import Examples
from dreamreader.training.losses import AdaptedSites, adapters_of, loss_of
from dreamreader.training.parts import Training

CHECKPOINTS = 20  # of a training


@dataclass(frozen=True)
class FittedAdapters:
    """Trained adapters.

    Attributes:
        reft: the adapters. history: of their losses.
        held_out: mean loss of rows that were held out, without and with the adapters, by term:
            sites (activations; 1 is the whole difference between the prompts), or the loss's name.
        trained, held: prompts that trained, and that were held out.
    """

    reft: Reft
    history: History
    held_out: dict[str, tuple[float, float]]
    trained: int
    held: int

    @property
    def explained(self) -> dict[str, float]:
        """Share of the loss that the adapters take away, by term; not of what is kept."""
        return {
            name: 1 - after / before
            for name, (before, after) in self.held_out.items()
            if before and not name.startswith("keep ")
        }


def fit_adapters(
    training: Training,
    place: AdaptedSites,
    examples: Examples,
    folder: Path | None = None,
    report: ProgressCallback = silent,
) -> FittedAdapters:
    """Trains adapters.

    Args:
        training: how. place: where, and of which model. examples: on what.
        folder: for checkpoints, from which a stopped training goes on to the same bits.
        report: called after every step.

    Raises:
        InvalidInput, UnknownName, NeverFired, NonFiniteLoss: as `loss_of`, `adapters_of` and
            `reft.train`.
    """
    reft = adapters_of(training, place)
    report(ProgressEvent("recording", 0, 1))
    loss = loss_of(training, place, examples)
    report(ProgressEvent("recording", 1, 1))
    recipe = training.recipe
    history = train(
        reft,
        loss,
        folder=folder,
        save_every=max(1, recipe["steps"] // CHECKPOINTS),
        progress=report,
        **recipe,
    )
    held_out, trained, held = evidence(loss, reft, recipe)
    return FittedAdapters(reft, history, held_out, trained, held)


def evidence(
    loss: Loss, reft: Reft, recipe: dict[str, Any]
) -> tuple[dict[str, tuple[float, float]], int, int]:
    """Losses of held-out rows without and with adapters; rows that trained, and that were held out.

    Without validation nothing was held out, and no losses are given.
    """
    batches = Batches(loss, recipe["batch_size"], recipe["validation"], recipe["seed"])
    if not len(batches.held):
        return {}, loss.rows, 0
    widths = {site: each.width for site, each in reft.adapters.items()}
    device = next(reft.parameters()).device
    none = Reft(widths, variant="bias", tokens=reft.tokens, device=device)  # adds 0
    before, after = (_terms(batches, each) for each in (none, reft))
    found = {name: (before[name], value) for name, value in after.items()}
    return found, len(batches.rows), len(batches.held)


@torch.no_grad()
def _terms(batches: Batches, reft: Reft) -> dict[str, float]:
    """Means over all held-out rows and calls, by term."""
    moments, totals = batches.loss.moments, dict[str, float]()
    count = len(batches.held) * moments
    for number, chosen in enumerate(torch.arange(count).split(batches.size)):
        batch = Batch(batches.held[chosen // moments], chosen % moments, -1 - number)
        for name, value in batches.loss.terms(reft, batch).items():
            totals[name] = totals.get(name, 0.0) + len(chosen) * float(value)
    return {name: total / count for name, total in totals.items()}


def orthonormality(reft: Reft) -> dict[str, float | None]:
    """Largest entry of R R' - I by site; None where the variant's rows are free."""
    found: dict[str, float | None] = {}
    with torch.no_grad():
        for site, adapter in reft.adapters.items():
            rows = adapter.tables()[2].double()
            apart = rows @ rows.mT - torch.eye(rows.shape[-2], device=rows.device)
            rotates = "rotation" in adapter.variant.names
            found[site] = float(apart.abs().max()) if rotates else None
    return found
