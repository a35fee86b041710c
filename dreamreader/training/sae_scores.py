"""What trained autoencoders are worth: scores of each, and how far seeds agree."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.sae import BatchTopK, SampledTopK, SparseAutoencoder
from dreamreader.sae.evaluate import (
    KnownAnswerScores,
    ReconstructionScores,
    score_known_answers,
    score_reconstruction,
    shuffle_features,
    with_random_decoder,
    with_random_encoder,
)
from dreamreader.sae.matching import mean_correlation
from dreamreader.store.dataset import StoreDataset
from dreamreader.training.sae_rows import KnownSource, RowSource, first_rows

_BATCH = 4096


class Titled(Protocol):
    """What an autoencoder is called."""

    @property
    def title(self) -> str: ...

    @property
    def control(self) -> str: ...


def measure(sae: SparseAutoencoder, source: RowSource, site: str, shuffled: bool) -> dict[str, Any]:
    """Scores on rows that are measured, as plain values; the autoencoder keeps its frequencies.

    Args:
        shuffled: whether it learned from shuffled rows, and is measured on such.
    """
    budget = source.spec.evaluation.inference == "budget"
    with _keeping_budget(sae) if budget else nullcontext():
        known, found = _score(sae, source, site, shuffled)
    sae.statistics["frequency"] = found.frequency.float()
    fired = found.fired.clamp(min=1)
    sae.statistics["mean"] = (found.strength / fired).float()  # of a latent when it is active
    histogram, scores = found.histogram(), _numbers(found)
    scores["histogram"] = {"edges": histogram.edges.tolist(), "counts": histogram.counts.tolist()}
    if budget:
        own = _score(sae, source, site, shuffled)[1]
        scores |= {"own_fvu": own.fvu, "own_l0": own.l0}
    if known is not None:
        names = ("f1", "precision", "recall", "mcc", "uniqueness")
        scores |= {name: getattr(known, name) for name in names}
    return scores


def _score(
    sae: SparseAutoencoder, source: RowSource, site: str, shuffled: bool
) -> tuple[KnownAnswerScores | None, ReconstructionScores]:
    spec = source.spec
    if isinstance(source, KnownSource) and not shuffled:
        size, count = spec.training.batch_size, spec.evaluation.rows
        known = score_known_answers(sae, source.world, count, size)
        return known, known.reconstruction
    rows = source.held_out(site)
    return None, score_reconstruction(sae, shuffle_features(rows) if shuffled else rows)


@contextmanager
def _keeping_budget(sae: SparseAutoencoder) -> Iterator[None]:
    """Meanwhile it keeps k of all latents on average, without a pool or a threshold."""
    had = sae.selection, sae.inference
    if isinstance(sae.selection, BatchTopK | SampledTopK):
        sae.selection, sae.inference = BatchTopK(sae.selection.k), "selection"
    try:
        yield
    finally:
        sae.selection, sae.inference = had


def seed_agreement(
    saes: Mapping[str, SparseAutoencoder], planned: Mapping[str, Titled]
) -> dict[str, float]:
    """For each title with several seeds, the mean over pairs of their mean correlation."""
    by_title: dict[str, list[SparseAutoencoder]] = {}
    for name, sae in saes.items():
        if not planned[name].control:
            by_title.setdefault(planned[name].title, []).append(sae)
    found = {}
    for title, own in by_title.items():
        pairs = [
            mean_correlation(a.W_dec.detach(), b.W_dec.detach())
            for a, b in itertools.combinations(own, 2)
        ]
        if pairs:
            found[title] = sum(pairs) / len(pairs)
    return found


def stored_batches(
    sae: SparseAutoencoder, store: Path, site: str | None, branch: str | None, rows: int
) -> list[Tensor]:
    """Rows of a store, in an order of their own.

    Args:
        site: by default the one that the autoencoder names.

    Raises:
        InvalidInput, UnknownName: there is no such site, or its rows have another width.
    """
    place = site or sae.metadata.get("site")
    if not place:
        raise InvalidInput("the autoencoder does not say its site; give one")
    dataset = StoreDataset(store, place, batch_size=min(rows, _BATCH), branch=branch)
    if dataset.site.width != sae.d_in:
        raise InvalidInput(
            f"{place} has width {dataset.site.width}, the autoencoder has d_in={sae.d_in}"
        )
    return list(first_rows(dataset, rows))


def compare_controls(sae: SparseAutoencoder, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Scores of an autoencoder, of what is left without half of it, and on shuffled rows."""
    found = {
        "autoencoder": score_reconstruction(sae, batches),
        "random decoder": score_reconstruction(with_random_decoder(sae), batches),
        "random encoder": score_reconstruction(with_random_encoder(sae), batches),
        "shuffled rows": score_reconstruction(sae, shuffle_features(batches)),
    }
    return {title: _numbers(each) for title, each in found.items()}


def _numbers(found: ReconstructionScores) -> dict[str, Any]:
    """Scores as plain values."""
    lottery = found.lottery()
    return {
        "fvu": found.fvu,
        "l0": found.l0,
        "dead": found.dead_share,
        "shrinkage": _number(found.shrinkage),
        "rows": found.rows,
        "lottery": _number(lottery.correlation),
        "rare_share": _number(lottery.rare_share),
    }


def _number(value: float) -> float | None:
    """A value as JSON has it."""
    return value if math.isfinite(value) else None
