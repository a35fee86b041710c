"""What a model loses where reconstructions of an autoencoder stand in for what it computed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.edits import Ablate
from dreamreader.engine import EditRequest, Reader, encoded
from dreamreader.errors import InvalidInput
from dreamreader.harvest import Harvest
from dreamreader.metrics.base import Outputs
from dreamreader.metrics.perplexity import mean_surprisal
from dreamreader.metrics.pixel_distance import PixelDistance
from dreamreader.sae import SAEEdit, SparseAutoencoder
from dreamreader.store.store import Store
from dreamreader.zoo.detector import pictures_to_tensor

ROWS = 8  # run together


@dataclass(frozen=True)
class SpliceScores:
    """What a model gives with reconstructions in place of a site's activations.

    Attributes:
        measure: `cross_entropy`, of the tokens of texts (natural), or `pixel_distance`, of final
            pictures from those of the model as it is.
        clean: of the model as it is. spliced: with reconstructions. error_kept: with what the
            autoencoder does not explain added back, which is `clean` unless something is wrong.
        zero, mean: with zeros, with the mean of the site in their place.
        prompts: how many were run.
    """

    measure: str
    clean: float
    spliced: float
    error_kept: float
    zero: float
    mean: float
    prompts: int

    @property
    def recovered(self) -> float:
        """(zero - spliced) / (zero - clean); NaN where zeros do no worse than the model."""
        return _share(self.zero, self.spliced, self.clean)

    @property
    def recovered_of_mean(self) -> float:
        """(mean - spliced) / (mean - clean); NaN where the mean does no worse."""
        return _share(self.mean, self.spliced, self.clean)


@dataclass(eq=False)
class SpliceTest:
    """Runs prompts as they are, ablated, and with reconstructions at a site.

    Args:
        reader: of a pipeline or of a language model, which reads the prompts.
        site: where. prompts: what is run. seeds: one for each prompt.
        mean: of the site's activations.
        where: `branch`, `steps` and `tokens` of the edits, those that the autoencoder learned from.
        arguments: of the pipeline.

    Example:
        >>> test = SpliceTest(reader, site, prompts, mean=rows.mean(0))  # doctest: +SKIP
        >>> test.score(sae).recovered  # doctest: +SKIP
        0.93
    """

    reader: Reader
    site: str
    prompts: Sequence[str]
    seeds: Sequence[int] = ()
    mean: Float[Tensor, " width"] | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InvalidInput("splice: there are no prompts")
        if self.seeds and len(self.seeds) != len(self.prompts):
            raise InvalidInput(
                f"splice: {len(self.seeds)} seeds for {len(self.prompts)} prompts; give one each"
            )

    @property
    def is_language(self) -> bool:
        return self.reader.kind == "language"

    def score(self, sae: SparseAutoencoder) -> SpliceScores:
        """What is lost with this autoencoder.

        Raises:
            InvalidInput: its codes depend on the batch, or it has another width than the site.
        """
        own = {**self.where}
        every = range(sae.d_sae)
        spliced = SAEEdit(self.site, sae, op="reconstruct", **own)
        kept = SAEEdit(self.site, sae, every, "scale", 1.0, **own)
        return SpliceScores(
            "cross_entropy" if self.is_language else "pixel_distance",
            self._level(None),
            self._level(spliced),
            self._level(kept),
            *self.ablated,
            len(self.prompts),
        )

    @cached_property
    def ablated(self) -> tuple[float, float]:
        """With zeros, and with the mean."""
        zero = Ablate(self.site, "zero", **self.where)
        if self.mean is None:
            return self._level(zero), math.nan
        return self._level(zero), self._level(
            Ablate(self.site, "mean", source=self.mean.float(), **self.where)
        )

    def _level(self, edit: EditRequest | None) -> float:
        """The mean over prompts of what is measured."""
        if edit is None:
            return self._clean
        pairs = zip(self._batches(edit), self._outputs, strict=True)
        values = [self._measure(got, clean) for got, clean in pairs]
        return float(torch.cat(values).mean())

    @cached_property
    def _outputs(self) -> list[Tensor]:
        """Pictures, or the surprisal of texts, of the model as it is."""
        return list(self._batches(None))

    @cached_property
    def _clean(self) -> float:
        return float(torch.cat([self._measure(each, each) for each in self._outputs]).mean())

    def _measure(self, got: Tensor, clean: Tensor) -> Tensor:
        if self.is_language:
            return got.double()
        rows: list[dict[str, Any]] = [{} for _ in got]
        found = PixelDistance().measure(Outputs(rows, got), Outputs(rows, clean))
        return torch.tensor(found["pixel_distance"], dtype=torch.float64)

    def _batches(self, edit: EditRequest | None) -> Iterator[Tensor]:
        """[rows, 3, h, w] pictures or [rows] surprisals."""
        edits = [] if edit is None else [edit]
        for start in range(0, len(self.prompts), ROWS):
            given = list(self.prompts[start : start + ROWS])
            seeds = list(self.seeds[start : start + ROWS]) or None
            with torch.inference_mode():
                if self.is_language:
                    found = self.reader.run(given, edits=edits, progress=False)
                    yield mean_surprisal(found.output.logits, **encoded(self.reader, given))
                    continue
                more = {"output_type": "pt", **self.arguments}
                found = self.reader.run(given, edits=edits, seeds=seeds, progress=False, **more)
                yield _tensor(found.images)


def splice_test_of(harvest: Harvest, site: str, count: int, mean: Tensor, **where: Any) -> Any:
    """A test with the first prompts of a harvest, each with its first seed.

    Args:
        count: of prompts. mean: of the site. where: branch, steps and tokens.

    Raises:
        InvalidInput: the harvest was of generated text, whose tokens are not those of its prompts.
    """
    job = harvest.job
    if job.generates:
        raise InvalidInput("evaluation.splice: a language model reads texts here; it generated")
    per_prompt = len(job.spec.seed_list)
    items, seeds = job.read(0, min(count, job.prompts.count) * per_prompt)
    settings = dict(job.settings)
    if "output_type" not in job.spec.pipeline:
        settings.pop("output_type", None)  # a harvest leaves out the decoder
    chosen = slice(None, None, per_prompt)
    return SpliceTest(
        job.reader,
        site,
        [item.prompt for item in items[chosen]],
        () if job.is_language else seeds[chosen],
        mean,
        {name: value for name, value in where.items() if value is not None},
        settings,
    )


def harvest_of(store: Store, reader: Reader | None = None) -> Harvest:
    """The harvest that a store is from, to run its subject and prompts again.

    Raises:
        InvalidInput: the store does not say it, or is merged from several.
    """
    specs = [job.spec for job in store.manifest.jobs if job.spec]
    if len(specs) != 1:
        raise InvalidInput(
            f"{store.path}: {len(specs)} harvests; the subject and prompts of one are needed to "
            "run it with reconstructions: give a store of one harvest, or evaluation.splice: 0"
        )
    return Harvest(specs[0], reader=reader)


def splice_numbers(found: SpliceScores) -> dict[str, Any]:
    """Scores as plain values."""
    names = ("clean", "spliced", "error_kept", "zero", "mean", "recovered", "recovered_of_mean")
    values = {name: getattr(found, name) for name in names}
    plain = {name: each if math.isfinite(each) else None for name, each in values.items()}
    return {"measure": found.measure, "prompts": found.prompts, **plain}


def _share(worst: float, got: float, best: float) -> float:
    return (worst - got) / (worst - best) if worst > best else math.nan


def _tensor(images: Any) -> Tensor:
    """Pictures as they are compared."""
    if isinstance(images, Tensor):
        return images.float()
    if isinstance(images[0], Tensor):
        return torch.stack(list(images))
    return pictures_to_tensor(images)
