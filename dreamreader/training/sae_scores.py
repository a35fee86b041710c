"""What trained autoencoders are worth: scores of each, and how far seeds agree."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.sae import (
    BatchTopK,
    JumpReLU,
    SampledTopK,
    SparseAutoencoder,
    TopK,
    calibrate_threshold,
)
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
from dreamreader.store.store import Store
from dreamreader.training.sae_evaluation import SiteEvaluation
from dreamreader.training.sae_rows import KnownSource, RowSource, first_rows
from dreamreader.training.sae_splice import harvest_of

_BATCH = 4096
_AS_TRAINED = 16  # batches that are encoded by the selection of training too


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
    rows = itertools.islice(source.held_out(site), _AS_TRAINED)
    return scores | compare_selection(sae, shuffle_features(rows) if shuffled else rows)


def calibrate(sae: SparseAutoencoder, source: RowSource, site: str, shuffled: bool) -> None:
    """Sets the threshold of an autoencoder that has a budget, from rows that are measured."""
    if isinstance(sae.selection, BatchTopK | SampledTopK):
        rows = itertools.islice(source.held_out(site), _AS_TRAINED)
        calibrate_threshold(sae, shuffle_features(rows) if shuffled else rows)


def compare_selection(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> dict[str, float]:
    """FVU and L0 as training selects, where inference does otherwise: a threshold of its own."""
    if isinstance(sae.selection, TopK | JumpReLU) or sae.threshold is None:
        return {}
    if sae.inference != "threshold":
        return {}
    found = score_reconstruction(sae, batches, as_trained=True)
    return {"fvu_in_training": found.fvu, "l0_in_training": found.l0}


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


def evaluate_stored(
    sae: SparseAutoencoder,
    store: Path,
    site: str | None,
    branch: str | None,
    rows: int,
    *,
    columns: Sequence[str] | None = None,
    samples: int = 256,
    splice: int = 0,
) -> tuple[dict[str, Any], str]:
    """Scores of an autoencoder and its controls on a store, and the site.

    Args:
        site: by default the one that the autoencoder names.
        rows: that are rebuilt. columns, samples: see `attributes_of`.
        splice: prompts of the store's harvest that are run with reconstructions in place.

    Raises:
        InvalidInput, UnknownName: there is no such site or column, rows have another width, or the
            store does not say what it is from.
    """
    place = site or sae.metadata.get("site")
    if not place:
        raise InvalidInput("the autoencoder does not say its site; give one")
    opened = Store(store)
    dataset = StoreDataset(opened, place, batch_size=min(rows, _BATCH), branch=branch)
    if dataset.site.width != sae.d_in:
        raise InvalidInput(
            f"{place} has width {dataset.site.width}, the autoencoder has d_in={sae.d_in}"
        )
    batches = list(first_rows(dataset, rows))
    evaluation = SiteEvaluation(
        opened,
        place,
        {"branch": branch},
        columns=columns,
        samples=samples,
        harvest=harvest_of(opened) if splice else None,
        prompts=splice,
        rows=batches,
    )
    return compare_controls(sae, batches, evaluation), place


def compare_controls(
    sae: SparseAutoencoder,
    batches: Sequence[Tensor],
    evaluation: SiteEvaluation | None = None,
) -> dict[str, Any]:
    """Scores of an autoencoder, of what is left without half of it, and on shuffled rows.

    Args:
        evaluation: what is measured beside rows.
    """
    halves = {
        "autoencoder": sae,
        "random decoder": with_random_decoder(sae),
        "random encoder": with_random_encoder(sae),
    }
    found = {}
    for title, each in halves.items():
        found[title] = _numbers(score_reconstruction(each, batches))
        found[title] |= compare_selection(each, batches[:_AS_TRAINED])
        found[title] |= {} if evaluation is None else evaluation.scores(each)
    found["shuffled rows"] = _numbers(score_reconstruction(sae, shuffle_features(batches)))
    return found


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
