"""How good a map is on held-out pairs, beside maps that know nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap
from dreamreader.mapping.checks import check_whole
from dreamreader.mapping.controls import MapControl, random_maps, shuffled_pairs
from dreamreader.mapping.fit import BY_GRADIENT
from dreamreader.mapping.maps import AffineMap
from dreamreader.mapping.measure import MappedPairs, linear_cka, retrieval, squared_errors
from dreamreader.mapping.problem import Data, check_data
from dreamreader.mapping.rows import PairedRows

SAMPLE = 2048


@dataclass(frozen=True)
class MapReport:
    """What a map reaches on pairs that it was not fitted to.

    With y the target rows, z the mapped ones, and means over the rows:

    Attributes:
        rows: pairs that were measured.
        fvu: sum |z - y|^2 / sum |y - mean|^2, with a mean for each dimension; of the mean 1.
        fvu_scalar: the same error over the variance about one mean of all dimensions, as code
            derived from arXiv:2503.04429 divides it; never above `fvu`.
        r2: mean over dimensions of 1 - their FVU, those that do not vary left out.
        cosine: mean cosine of z and y, neither less its mean; None from moments.
        cka_source: linear CKA of source and target, which no map changes. cka: of z and y. None
            where products of the target with itself were not kept.
        retrieval: share of sampled pairs whose z is nearest to its own y among all that were
            sampled, by the cosine about the mean of y; None from moments. sampled: how many.
        groups: how many groups (prompts) the shuffled pairs had to exchange; 0 where none could be.
        fvu_by_dimension: [d_target], NaN where the target does not vary.
        method: of the map. controls: by name, see `score_map`.

    Reference:
        Kornblith et al., Similarity of neural network representations revisited,
        arXiv:1905.00414 (CKA).
    """

    rows: int
    fvu: float
    fvu_scalar: float
    r2: float
    cosine: float | None
    cka_source: float | None
    cka: float | None
    retrieval: float | None
    sampled: int
    groups: int
    fvu_by_dimension: Float[Tensor, " d_target"]
    method: str
    controls: Mapping[str, MapControl] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a card or JSON; all but the dimensions."""
        names = ("rows", "fvu", "fvu_scalar", "r2", "cosine", "cka_source", "cka", "retrieval")
        own = {name: getattr(self, name) for name in (*names, "sampled", "groups", "method")}
        return own | {"controls": {name: each.as_dict() for name, each in self.controls.items()}}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines: the map, and below it each control with its quantiles and p value."""
        head = ["", "FVU", "FVU scalar", "R2", "cosine", "CKA", "top-1", "p"]
        return head, [self.line(self.method), *(_line(*each) for each in self.controls.items())]

    def line(self, name: str) -> list[str]:
        """Its own line of a table."""
        numbers = (self.fvu, self.fvu_scalar, self.r2, self.cosine, self.cka, self.retrieval)
        return [name, *map(_shown, numbers), ""]

    def __str__(self) -> str:
        return _aligned(*self.table())


@torch.inference_mode(False)
@torch.no_grad()
def score_map(
    own: ActivationMap,
    held_out: Data,
    *,
    draws: int = 1000,
    sample: int = SAMPLE,
    seed: int = 0,
) -> MapReport:
    """Measures a map on pairs that it was not fitted to, and what maps that know nothing reach.

    Controls: `mean`, the mean of these target rows; `random`, linear maps with normal entries,
    between the means, scaled so that what they give varies as much as what the map gives;
    `random, scaled`, the same with the best scale of each; `shuffled`, what the map gives for one
    group (prompt) beside the target rows of another, at the same places (of a sample, so only from
    rows). p is (1 + hits) / (1 + draws), hits being the draws that are as good as the map. The p of
    `random` says that the map is not one of random ones, for these rows; that of `shuffled` that it
    knows one prompt from another. Rows of a prompt depend on each other, so whole groups change
    places, and of n groups there are n! orders: with 3, p is 1/6 at least.

    Args:
        own: any map. held_out: pairs; or their moments (with gram=True for CKA) for an affine map,
            which give the same numbers, but no cosine, retrieval or shuffled pairs.
        draws: of random maps and of shuffled pairs. sample: pairs for retrieval and shuffling.
        seed: of the draws and the sample.

    Raises:
        InvalidInput: widths differ, there are no rows, a row is not finite, the target does not
            vary, or the map is not affine and there are only moments.

    Example:
        >>> x = torch.randn(300, 4)
        >>> rows = PairedRows(x, x.flip(1))
        >>> flip = AffineMap(torch.zeros(4), torch.eye(4).flip(1), torch.zeros(4))
        >>> report = score_map(flip, rows)
        >>> round(report.fvu, 6), report.retrieval, report.controls["random"].p < 0.01
        (0.0, 1.0, True)
    """
    if not isinstance(own, ActivationMap):
        raise InvalidInput(
            f"score_map: a map is needed, got {type(own).__name__}; fit_map fits one"
        )
    check_data("score_map", held_out)
    draws, seed = check_whole("score_map: draws", draws, 1), check_whole("score_map: seed", seed)
    sample = check_whole("score_map: sample", sample, 2)
    if (held_out.d_source, held_out.d_target) != (own.d_source, own.d_target):
        raise InvalidInput(
            f"{own.name}: it leads from {own.d_source} to {own.d_target} features, the pairs from "
            f"{held_out.d_source} to {held_out.d_target}"
        )
    cosine = measured = None
    if isinstance(held_out, PairedRows):
        measured = MappedPairs(own, held_out, sample, seed)
        pairs, mapped, cosine = measured.pairs, measured.mapped, measured.cosine
    elif not isinstance(own, AffineMap):
        raise InvalidInput(
            f"{own.name}: only an affine map is measured from moments; give pairs of rows"
        )
    else:
        pairs = held_out
        mapped = held_out.through(own.weight.double(), own.bias.double())
    if pairs.rows < 2:
        raise InvalidInput(f"{own.name}: {pairs.rows} held-out pairs have no variance; give more")
    variances = pairs.target_squares
    total = float(variances.sum())
    if not total > 0:
        raise InvalidInput(f"{own.name}: the held-out target rows are all equal")
    errors = squared_errors(mapped)
    error, mean = float(errors.sum()), pairs.target_mean
    apart = pairs.weight * float((mean - mean.mean()).square().sum())
    by_dimension = torch.where(variances > 0, errors / variances, torch.nan)
    fvu = error / total
    controls = {"mean": MapControl((1.0,), None, _cosine_of_mean(held_out, mean))}
    generator = torch.Generator().manual_seed(seed)
    controls |= random_maps(pairs, float(mapped.source_scatter.trace()), fvu, draws, generator)
    nearest, sampled, groups = None, 0, 0
    if measured is not None:
        nearest, sampled = retrieval(*measured.sampled), len(measured.sampled[0])
        if measured.groups is not None:
            groups = len(measured.groups[0])
            controls["shuffled"] = shuffled_pairs(*measured.groups, draws, generator)
    return MapReport(
        pairs.rows,
        fvu,
        error / (total + apart),
        float((1 - by_dimension[variances > 0]).mean()),
        cosine,
        linear_cka(pairs),
        linear_cka(mapped),
        nearest,
        sampled,
        groups,
        by_dimension,
        own.card.method,
        controls,
    )


def compare_maps(reports: Mapping[str, MapReport]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of several maps on the same pairs, the best first.

    The last line says whether a map by gradients beats the best closed form, which is the bar.

    Args:
        reports: by name.

    Raises:
        InvalidInput: there are none, or they are of other numbers of pairs.

    Example:
        >>> x = torch.randn(300, 4)
        >>> rows = PairedRows(x, x.flip(1))
        >>> from dreamreader.mapping import fit_map
        >>> found = {name: score_map(fit_map(rows, name), rows) for name in ("mean", "ridge")}
        >>> [line[0] for line in compare_maps(found)[1]]
        ['ridge', 'mean']
    """
    if not reports or len({each.rows for each in reports.values()}) > 1:
        raise InvalidInput("compare_maps: reports of the same held-out pairs are needed")
    order = sorted(reports, key=lambda name: reports[name].fvu)
    lines = [reports[name].line(name) for name in order]
    trained = [name for name in order if reports[name].method in BY_GRADIENT]
    closed = [name for name in order if reports[name].method not in BY_GRADIENT]
    if trained and closed:
        best, bar = reports[trained[0]].fvu, reports[closed[0]].fvu
        verdict = "beats" if best < bar else "does not beat"
        lines.append([f"{trained[0]} {verdict} {closed[0]}", _shown(best - bar), *[""] * 6])
    return ["", "FVU", "FVU scalar", "R2", "cosine", "CKA", "top-1", "p"], lines


def _cosine_of_mean(held: Data, mean: Tensor) -> float | None:
    """Mean cosine of the mean of the target with its rows."""
    if not isinstance(held, PairedRows):
        return None
    total = weight = 0.0
    for block in held.blocks():
        _, y, w = block.flat()
        similarity = torch.cosine_similarity(y.double(), mean.unsqueeze(0), dim=1)
        total += float(similarity.sum() if w is None else (similarity * w).sum())
        weight += float(len(y) if w is None else w.sum())
    return total / weight


def _line(name: str, control: MapControl) -> list[str]:
    low, middle, high = control.quantiles()
    fvu = _shown(middle) if low == high else f"{middle:.3f} ({low:.3f} to {high:.3f})"
    p = "" if control.p is None else f"{control.p:.4f}"
    return [name, fvu, "", "", _shown(control.cosine), "", "", p]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _aligned(head: list[str], lines: list[list[str]]) -> str:
    """Columns of equal width."""
    sizes = [max(len(line[n]) for line in [head, *lines]) for n in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)).rstrip()
        for line in [head, *lines]
    )
