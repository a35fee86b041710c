"""Training adapters: batches are a function of the seed and the step, so a stop changes nothing."""

import os
from pathlib import Path
from typing import Any

from dreamreader._progress import Progress
from dreamreader.errors import InvalidInput
from dreamreader.fitting import ByStep, History, NonFiniteLoss, Recipe, fit
from dreamreader.reft.batches import Batches
from dreamreader.reft.losses import Loss
from dreamreader.reft.model import Reft

RESULT = "reft.safetensors"


def train(
    reft: Reft,
    loss: Loss,
    *,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: Progress = True,
    **recipe: Any,
) -> History:
    """Trains adapters in place.

    Args:
        reft: the adapters; they end as the best on validation, or the last without validation.
        loss: what is minimised.
        folder: for `training.safetensors`, from which the same call goes on where it was stopped,
            equal to the bit to a training that was not, and `reft.safetensors`, the result.
        save_every: steps between two writings of the former.
        progress: shown by default, or a function of a `ProgressEvent`, or False.
        recipe: attributes of `Recipe`, but `epochs`: examples are drawn step by step.

    Returns:
        Losses of all steps, those before a stop too.

    Raises:
        NonFiniteLoss: the loss or a parameter is not finite; names step, rows and site. The
            adapters are what they were at the last finite loss, on disk too.
        InvalidInput, UnknownName: a value of the recipe cannot be right, or the folder holds a
            training with another recipe, of other adapters, or on other data, or is in use.

    Example:
        >>> history = train(reft, ActivationMatch(pairs), steps=300)     # doctest: +SKIP
    """
    how = Recipe(**recipe)
    if how.epochs is not None or how.validate_every is None:
        raise InvalidInput("train: adapters have steps, no epochs: give steps and validate_every")
    if how.patience is not None and not how.validation:
        raise InvalidInput("train: patience needs a share of rows for validation")
    batches = Batches(loss, how.batch_size, how.validation, how.seed)
    adapters = [each.extra_repr() for each in reft.adapters.values()]
    result = None if folder is None else Path(folder) / RESULT
    try:
        history = fit(
            reft,
            loss,
            ByStep(batches.__getitem__),
            how,
            folder,
            progress,
            validate=(lambda: batches.validation(reft)) if how.validation else None,
            of={
                **{"adapters": adapters, "rows": loss.rows, "calls": loss.moments},
                **{"tokens": repr(reft.tokens), "denoising steps": repr(reft.steps)},
            },
            save_every=save_every,
        )
    except NonFiniteLoss as error:
        if result is None:
            raise
        reft.save(result)
        raise NonFiniteLoss(f"{error}, in {result} too") from error
    if result is not None:
        reft.save(result)
    return history
