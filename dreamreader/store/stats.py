"""Statistics of the rows of a site, in one pass over a store."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader._files import replacing, write_atomic
from dreamreader._progress import Progress, show_progress
from dreamreader.errors import InvalidInput
from dreamreader.ops import moments
from dreamreader.store.layout import SiteLayout
from dreamreader.store.rows import RowBlock, blocks_of, report_rows
from dreamreader.store.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
WIDEST = 8192  # of a covariance: 512 MB
_BINS = 512  # of norms, for each factor of 2

Key = tuple[int, str]


@dataclass(frozen=True)
class Group:
    """Statistics of rows with finite values.

    Attributes:
        step, branch: of the rows; None for all. rows: how many.
        mean, variance: of each feature, float64; the variance is divided by `rows`.
        mean_norm: mean Euclidean length. norm_quantiles: lengths that these shares of the rows do
            not exceed, to 0.1 %.
    """

    step: int | None
    branch: str | None
    rows: int
    mean: Float[Tensor, " width"]
    variance: Float[Tensor, " width"]
    mean_norm: float
    norm_quantiles: dict[float, float]

    def numbers(self) -> dict[str, Any]:
        """All but the vectors, under the names that tables have."""
        quantiles = {f"norm_q{q:g}": value for q, value in self.norm_quantiles.items()}
        whole = {"variance": float(self.variance.sum()), "norm_of_mean": float(self.mean.norm())}
        own = {"step": self.step, "branch": self.branch, "rows": self.rows}
        return own | {"mean_norm": self.mean_norm} | whole | quantiles


@dataclass(frozen=True)
class SiteStatistics:
    """What `stats` found.

    Attributes:
        site: whose rows. whole: of all rows. groups: by step and branch.
        not_finite: rows that were left out for an infinite value or NaN.
        covariance: of the features over all rows, float64; None where it was not asked for.
    """

    site: SiteLayout
    whole: Group
    groups: tuple[Group, ...]
    not_finite: int
    covariance: Float[Tensor, "width width"] | None = None

    def normalisation(self, centre: bool = False) -> tuple[Float[Tensor, " width"], float]:
        """Mean and scale of (x - mean) * scale, as dictionary learning normalises rows.

        Args:
            centre: subtract the mean. Without it the mean is 0 and the scale is that which makes
                the mean norm of the rows sqrt(width). With it the scale makes the root mean square
                of their norms sqrt(width): the mean norm about the mean would take a second pass.

        Returns:
            float32 [width] and a number, as the loader's `normalise` takes them.

        Raises:
            InvalidInput: all rows are 0, or equal where the mean is subtracted.
        """
        width, mean = self.site.width, self.whole.mean.float()
        norm = float(self.whole.variance.sum().sqrt()) if centre else self.whole.mean_norm
        if norm == 0:
            raise InvalidInput(f"{self.site.name}: rows of norm 0 cannot be scaled to a norm")
        return mean if centre else torch.zeros_like(mean), math.sqrt(width) / norm

    def table(self) -> "pa.Table":
        """One line for each step and branch; variance is that of all features together."""
        import pyarrow as pa

        return pa.Table.from_pylist([each.numbers() for each in self.groups])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; all but the covariance, which is too large for it."""
        groups = [_vectors(each) for each in (self.whole, *self.groups)]
        return {
            "site": self.site.as_dict(),
            "not_finite": self.not_finite,
            "whole": groups[0],
            "groups": groups[1:],
        }

    def write(self, path: str | Path) -> Path:
        """Writes x.json, and where there is a covariance x.covariance.npy beside it."""
        file = Path(path)
        if self.covariance is not None:
            with replacing(file.with_suffix(".covariance.npy")) as part, open(part, "wb") as whole:
                np.save(whole, self.covariance.numpy())
        return write_atomic(file, json.dumps(self.as_dict(), allow_nan=False) + "\n")


def stats(
    store: str | Path | Store,
    site: str,
    steps: Any = None,
    branch: str | Sequence[str] | None = None,
    covariance: bool = False,
    progress: Progress = True,
) -> SiteStatistics:
    """Reads the rows of a site once and takes their mean, variance and norms, in float64.

    Args:
        store: or its folder. site, steps, branch: see `Store.segments`.
        covariance: take that of all rows together too.
        progress: shown by default, or a function of a `ProgressEvent`, or False.

    Returns:
        By step and branch, and over all.

    Raises:
        UnknownName: the store has no such site or branch.
        InvalidInput: no finite rows are chosen, or the rows are too wide for a covariance.

    Example:
        >>> found = stats("activations", "unet.mid_block", covariance=True)
        >>> mean, scale = found.normalisation(centre=True)
    """
    opened = store if isinstance(store, Store) else Store(store)
    segments = opened.segments(site, steps, branch)
    if covariance and segments.site.width > WIDEST:
        wide = segments.site.width
        raise InvalidInput(
            f"{site}: a covariance takes {WIDEST:,} features at most, it has {wide:,}"
        )
    sums = _SiteSums(segments.site, covariance)
    with show_progress(progress) as report:
        for block in report_rows(blocks_of(segments), segments.total, report):
            sums.add(block)
    return sums.result()


@dataclass
class _StatisticsPart:
    """Sums of rows with one step and branch, about the common shift."""

    rows: int
    total: Tensor
    square: Tensor
    norm: float = 0.0
    norms: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "_StatisticsPart") -> "_StatisticsPart":
        return _StatisticsPart(
            self.rows + other.rows,
            self.total + other.total,
            self.square + other.square,
            self.norm + other.norm,
            self.norms + other.norms,
        )


class _SiteSums:
    """Sums over the blocks so far."""

    def __init__(self, site: SiteLayout, covariance: bool):
        self.site = site
        self.shift = torch.zeros(site.width, dtype=torch.float64)
        self.product = (
            torch.zeros(site.width, site.width, dtype=torch.float64) if covariance else None
        )
        self.parts: dict[Key, _StatisticsPart] = {}
        self.not_finite = 0

    def add(self, block: RowBlock) -> None:
        x = block.values
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        finite = norms.isfinite()
        self.not_finite += int((~finite).sum())
        if not self.parts and finite.any():
            self.shift = x[finite].double().mean(0)
        keys, labels = _labels(block)
        labels = torch.from_numpy(labels).where(finite, -1)
        found = moments(x, labels, len(keys), shift=self.shift)
        for number, key in enumerate(keys):
            own = norms[labels == number].numpy()
            part = _StatisticsPart(
                int(found.rows[number]), found.total[number], found.square[number]
            )
            part.norm, part.norms = float(own.sum()), _bin(own)
            if part.rows:
                self.parts[key] = self.parts[key] + part if key in self.parts else part
        if self.product is not None:
            centred = x[finite].double() - self.shift
            self.product.addmm_(centred.T, centred)

    def result(self) -> SiteStatistics:
        if not self.parts:
            raise InvalidInput(f"{self.site.name}: no rows with finite values are chosen")
        parts = [self.parts[key] for key in sorted(self.parts)]
        groups = tuple(self._group(self.parts[key], *key) for key in sorted(self.parts))
        whole = sum(parts[1:], parts[0])
        covariance = None
        if self.product is not None:
            mean = whole.total / whole.rows
            covariance = self.product / whole.rows - mean[:, None] * mean
        return SiteStatistics(
            self.site, self._group(whole, None, None), groups, self.not_finite, covariance
        )

    def _group(self, part: _StatisticsPart, step: int | None, branch: str | None) -> Group:
        mean = part.total / part.rows
        variance = (part.square / part.rows - mean.square()).clamp(min=0)
        quantiles = {q: _quantile(part.norms, q) for q in QUANTILES}
        norm = part.norm / part.rows
        return Group(step, branch, part.rows, self.shift + mean, variance, norm, quantiles)


def _labels(block: RowBlock) -> tuple[list[Key], np.ndarray]:
    """The steps and branches of a block, and for each row the place of its own among them."""
    _, moment, branch, _ = block.keys.T
    steps = block.shard.moments[moment, 0].astype(np.int64)
    pairs, labels = np.unique(np.column_stack([steps, branch]), axis=0, return_inverse=True)
    names = block.shard.branches
    return [(int(step), names[number]) for step, number in pairs], labels.reshape(-1)


def _bin(norms: np.ndarray) -> Counter[int]:
    bins = np.floor(np.log2(np.maximum(norms, 5e-324)) * _BINS).astype(np.int64)
    return Counter(
        dict(zip(*(x.tolist() for x in np.unique(bins, return_counts=True)), strict=True))
    )


def _quantile(norms: Counter[int], share: float) -> float:
    """The middle of the bin that the row at this share is in."""
    bins = sorted(norms)
    upto = np.cumsum([norms[each] for each in bins])
    place = np.searchsorted(upto, share * (upto[-1] - 1), side="right")
    return 2.0 ** ((bins[min(place, len(bins) - 1)] + 0.5) / _BINS)


def _vectors(group: Group) -> dict[str, Any]:
    return group.numbers() | {"mean": group.mean.tolist(), "variances": group.variance.tolist()}
