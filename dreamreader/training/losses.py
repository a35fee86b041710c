"""The loss that a spec asks for, on what its prompts give."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.reft import (
    ActivationMatch,
    Batch,
    Denoising,
    LanguageKeep,
    LanguageLoss,
    Loss,
    NoiseMatch,
    Reft,
    Together,
    encode_images,
    keep_activations,
    record_calls,
    record_pairs,
)
from dreamreader.specs.subject import is_language, steps_of
from dreamreader.training.examples import Examples, pictures_of
from dreamreader.training.parts import Training


@dataclass(frozen=True)
class AdaptedSites:
    """Where adapters are, and how the model runs.

    Attributes:
        reader: of the model. sites: site strings or patterns.
        branch, tokens: of the edits. settings: of a run.
        batch: rows of a call while activations are recorded.
    """

    reader: Reader
    sites: str | list[str]
    branch: str = "cond"
    tokens: Any = None
    settings: Mapping[str, Any] | None = None
    batch: int = 16

    @property
    def is_language(self) -> bool:
        return is_language(self.reader)

    @property
    def steps(self) -> int | None:
        """Denoising steps of a run; None for a language model."""
        return steps_of(self.reader, self.settings or {})


def adapters_of(training: Training, place: AdaptedSites) -> Reft:
    """Adapters with their first values.

    Raises:
        UnknownName, NeverFired: a site is not there, or never runs.
        InvalidInput: a rank is above a width, or `per_step` where there are no steps.
    """
    if training.per_step and place.steps is None:
        raise InvalidInput("training.per_step: a language model has no denoising steps")
    return Reft.for_sites(
        place.reader,
        place.sites,
        training.rank,
        training.variant,
        per_step=place.steps if training.per_step else None,
        tokens=place.tokens,
        init=training.init,
        seed=training.seed,
        **(place.settings or {}),
    )


def loss_of(training: Training, place: AdaptedSites, examples: Examples) -> Loss:
    """Runs what the loss needs before training; its rows are prompts.

    Raises:
        InvalidInput: the loss does not fit the model or the examples.
    """
    if training.loss == "language" or place.is_language:
        if training.loss not in ("language", "activations"):
            raise InvalidInput(f"training.loss: {training.loss} is for pipelines, not for texts")
        if training.loss == "language" and not place.is_language:
            raise InvalidInput("training.loss: language is for language models, not for pipelines")
    make = {"activations": _activations, "noise": _noise, "denoising": _denoising}
    found, kept = make.get(training.loss, _language)(training, place, examples)
    if len(examples.seeds) > 1:
        found = PromptwiseLoss(found, len(examples.seeds))
    if training.keep is not None and kept is not None:
        found = Together(found, kept, training.keep.weight)
    return found


class PromptwiseLoss(Loss):
    """A loss whose rows of one prompt count as one: none of them is held out without the others.

    Args:
        own: has rows prompt by prompt, and for each prompt seed by seed. seeds: of each prompt.
    """

    def __init__(self, own: Loss, seeds: int):
        self.own, self.seeds = own, seeds
        self.rows, self.moments = own.rows // seeds, own.moments * seeds

    def terms(self, reft: Reft, batch: Batch) -> dict[str, Tensor]:
        return self.own.terms(reft, self._of(batch))

    def culprit(self, reft: Reft, batch: Batch) -> str:
        return self.own.culprit(reft, self._of(batch))

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self.own.ready():
            yield

    def _of(self, batch: Batch) -> Batch:
        rows = batch.rows * self.seeds + batch.moments // self.own.moments
        return Batch(rows, batch.moments % self.own.moments, batch.seed)


_Made = tuple[Loss, Loss | None]


def _run(place: AdaptedSites) -> dict[str, Any]:
    return {"branch": place.branch, "batch_size": place.batch, **(place.settings or {})}


def _activations(training: Training, place: AdaptedSites, examples: Examples) -> _Made:
    given = {"tokens": place.tokens, **_run(place)}
    pairs = record_pairs(
        place.reader,
        examples.each(examples.prompts),
        examples.each(examples.partners),
        place.sites,
        seeds=examples.row_seeds,
        trajectory=training.trajectory,
        **given,
    )
    loss = ActivationMatch(pairs)
    if not examples.keep:
        return loss, None
    kept, first = list(examples.keep), examples.seeds[0]
    same = record_pairs(place.reader, kept, kept, place.sites, seeds=first, **given)
    return loss, keep_activations(same, loss)


def _noise(training: Training, place: AdaptedSites, examples: Examples) -> _Made:
    base, teacher = (
        record_calls(place.reader, examples.each(each), seeds=examples.row_seeds, **_run(place))
        for each in (examples.prompts, examples.partners)
    )
    loss = NoiseMatch(place.reader, base, teacher, training.trajectory)
    return loss, _keep_noise(place, examples)


def _denoising(training: Training, place: AdaptedSites, examples: Examples) -> _Made:
    calls = record_calls(
        place.reader, examples.each(examples.prompts), seeds=examples.row_seeds, **_run(place)
    )
    pictures = encode_images(place.reader, pictures_of(examples.partners))
    loss = Denoising(place.reader, calls, pictures.repeat_interleave(len(examples.seeds), 0))
    return loss, _keep_noise(place, examples)


def _keep_noise(place: AdaptedSites, examples: Examples) -> Loss | None:
    if not examples.keep:
        return None
    first = examples.seeds[0]
    same = record_calls(place.reader, list(examples.keep), seeds=first, **_run(place))
    return NoiseMatch(place.reader, same, same)


def _language(training: Training, place: AdaptedSites, examples: Examples) -> _Made:
    loss = LanguageLoss(
        place.reader, examples.each(examples.prompts), examples.each(examples.partners)
    )
    return loss, LanguageKeep(place.reader, examples.keep) if examples.keep else None
