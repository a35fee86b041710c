"""What trained autoencoders are worth: scores of each, and how far seeds agree."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Protocol

from dreamreader.sae import SparseAutoencoder
from dreamreader.sae.evaluate import score_known_answers, score_reconstruction, shuffle_features
from dreamreader.sae.matching import mean_correlation
from dreamreader.training.sae_rows import KnownRows, RowSource


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
    rows = source.held_out(site)
    found = score_reconstruction(sae, shuffle_features(rows) if shuffled else rows)
    sae.statistics["frequency"] = found.frequency.float()
    fired = found.fired.clamp(min=1)
    sae.statistics["mean"] = (found.strength / fired).float()  # of a latent when it is active
    histogram, lottery = found.histogram(), found.lottery()
    scores: dict[str, Any] = {
        "fvu": found.fvu,
        "l0": found.l0,
        "dead": found.dead_share,
        "shrinkage": found.shrinkage,
        "rows": found.rows,
        "lottery": _number(lottery.correlation),
        "rare_share": _number(lottery.rare_share),
        "histogram": {"edges": histogram.edges.tolist(), "counts": histogram.counts.tolist()},
    }
    if isinstance(source, KnownRows) and not shuffled:
        count = source.spec.evaluation.rows
        known = score_known_answers(sae, source.world, count, source.spec.training.batch_size)
        names = ("f1", "precision", "recall", "mcc", "uniqueness")
        scores |= {name: getattr(known, name) for name in names}
    return scores


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


def _number(value: float) -> float | None:
    """A value as JSON has it."""
    return value if math.isfinite(value) else None
