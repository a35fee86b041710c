"""Gathering labelled rows batch by batch, and fitting directions from their sums."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering.directions import Directions
from dreamreader.steering.evidence import Evidence
from dreamreader.steering.fit_site import NORMS, SiteData, fit_site
from dreamreader.steering.gathered import Gathered, check_pairs, places_of, span
from dreamreader.steering.methods import NEEDS, FitOptions, check_method
from dreamreader.steering.rows import Recorded, SiteRows, site_rows
from dreamreader.steering.split import HELD_OUT, RowSplit
from dreamreader.steering.statistics import KEEPS, Keep, Statistics

STEPS = ("each", "shared")
Numbers = Int[np.ndarray, " rows"]


class Fitter:
    """Gathers labelled rows batch by batch, and fits directions between labels from their sums.

    Memory does not grow with the rows (but with `keep="rows"`). One row of `holdout` has no part in
    any fit: these tell how well a direction separates the labels. Where a row goes depends on its
    number within its label, so the size of the batches does not show in the result.

    Args:
        labels: their names, where batches give numbers instead; taken from the batches otherwise.
        steps: `each` fits every step of a run by itself; `shared` averages a row over its steps and
            fits one direction [features].
        keep: what the methods need: `moments` (mean, caa), `covariance` (pca and lda too;
            features^2 numbers for each label, half and step), `rows` (all; rows stay in memory).
        holdout: one row of so many of each label is kept out of the fit; 0 keeps none.
        kept: rows of each label that are kept out at most, the first ones; they stay in memory.
        seed: of the split.

    Example:
        >>> fitter = Fitter()
        >>> fitter.add({"0": torch.tensor([[0.0, 1.0], [2.0, 1.0]] * 8)}, ["red", "blue"] * 8)
        >>> fitter.fit("red", "blue")["0"].tolist()
        [2.0, 0.0]
    """

    def __init__(
        self,
        labels: Sequence[str] = (),
        *,
        steps: str = "each",
        keep: Keep = "moments",
        holdout: int = 4,
        kept: int = 1024,
        seed: int = 0,
    ):
        if steps not in STEPS:
            raise UnknownName("choice of steps", steps, STEPS)
        if keep not in KEEPS:
            raise UnknownName("kind of statistics", keep, KEEPS)
        if isinstance(labels, str) or len(set(labels)) < len(labels):
            raise InvalidInput(f"labels must be different names, got {labels!r}")
        self._labels = list(labels)
        self._shared = steps == "shared"
        self._keep: Keep = keep
        self._split = RowSplit(holdout, kept, seed)
        self._seed = seed
        self._sites: dict[str, Gathered] = {}

    @property
    def sites(self) -> list[str]:
        return list(self._sites)

    @property
    def labels(self) -> list[str]:
        return list(self._labels)

    def add(
        self,
        recorded: Recorded,
        labels: str | Sequence[str] | Int[Tensor, " rows"],
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        """Adds rows.

        Args:
            recorded: a `Cache` or `Activation` of one branch, or tensors by site: [rows, features],
                [rows, steps, features] or [rows, steps, tokens, features]. Rows are averaged over
                their tokens; which ones these are is up to the recording.
            labels: one for each row, one for all, or their numbers as an int64 tensor.
            groups: what belongs together (a prompt, a seed): rows of a group are kept out together,
                whatever their label. By default the n-th rows of all labels belong together.

        Raises:
            InvalidInput: labels or groups are not as many as the rows, steps or features differ
                from those before, or a value is not finite; then nothing of the site is added.
        """
        for site, found in site_rows(recorded, self._shared).items():
            count = len(found.values)
            numbers = self._numbers(site, labels, count)
            if groups is not None and len(groups) != count:
                raise InvalidInput(f"{site}: {len(groups)} groups for {count} rows")
            at = self._site(site, found)
            seen = np.bincount(numbers).tolist()
            places = places_of(at, numbers, seen, groups)
            self._enter(site, at, found.values, numbers, places)
            for label, more in enumerate(seen):
                at.seen[label] = at.seen.get(label, 0) + more

    def add_pairs(
        self, source: Recorded, target: Recorded, labels: tuple[str, str] = ("source", "target")
    ) -> None:
        """Adds rows that belong together: row i of the target is row i of the source, changed.

        Args:
            source, target: as in `add`, with the same sites and as many rows.
            labels: names of both.

        Raises:
            InvalidInput: sites, rows, steps or features of both differ, or as in `add`.
        """
        first, second = (site_rows(recorded, self._shared) for recorded in (source, target))
        check_pairs(first, second)
        for site, found in first.items():
            count = len(found.values)
            both = torch.cat([found.values, second[site].values])
            s, t = (int(self._numbers(site, label, 1)[0]) for label in labels)
            numbers = np.repeat([s, t], count)
            at = self._site(site, found)
            places = np.arange(at.paired, at.paired + count)
            self._enter(site, at, both, numbers, np.tile(places, 2))
            at.paired += count
            for label in (s, t):
                at.seen[label] = at.seen.get(label, 0) + count
            if self._keep != "moments":
                apart = at.pairs.setdefault((s, t), Statistics(self._keep))
                change = second[site].values.double() - found.values.double()
                apart.add(change, torch.from_numpy(self._split.of(places)), 2)

    def mean(self, site: str, label: str) -> Float[Tensor, "steps features"]:
        """Mean of the rows of a label that are in the fit, float64."""
        at = self._at(site)
        return at.statistics.mean(self._halves(site, label))

    def variance(self, site: str, label: str) -> Float[Tensor, "steps features"]:
        """Variance of every feature over the rows of a label that are in the fit, float64."""
        at = self._at(site)
        return at.statistics.variance(self._halves(site, label))

    def fit(
        self,
        source: str = "source",
        target: str = "target",
        method: str = "mean",
        *,
        norm: str | None = None,
        shrinkage: float | None = None,
        l2: float = 1.0,
    ) -> Directions:
        """Directions that lead from one label to another, with their evidence.

        Args:
            source, target: labels.
            method: `mean` difference of means; `caa` the same at length 1; `pca` first component of
                the pairs' differences, or of the centred rows; `lda` the difference under the
                inverse of the shrunk covariance; `logistic` the weight of a probe.
            norm: `channel`, `tensor` or `none`, see `Directions`; by default `none` for `mean` and
                `channel` for the others.
            shrinkage: lda: share of the identity, 0 to 1; chosen from the data where None.
            l2: logistic: weight of the penalty, above 0.

        Returns:
            Directions in float32 on the CPU.

        Raises:
            UnknownName: there is no such label, method or norm.
            InvalidInput: a label has no rows in the fit, or what the method needs was not kept.
        """
        check_method(method)
        norm = norm or ("none" if method == "mean" else "channel")
        if norm not in NORMS:
            raise UnknownName("norm", norm, NORMS)
        if source == target:
            raise InvalidInput(f"source and target are both {source!r}: one label has no direction")
        needed = NEEDS.get(method, "moments")
        if KEEPS.index(needed) > KEEPS.index(self._keep):
            raise InvalidInput(f"method {method!r} needs Fitter(keep={needed!r})")
        if not self._sites:
            raise InvalidInput("no rows were added, there is nothing to fit")
        vectors: dict[str, Tensor] = {}
        evidence: dict[str, Evidence] = {}
        for number, site in enumerate(self._sites):
            data = self._data(site, source, target)
            try:
                vectors[site], evidence[site] = fit_site(
                    data, method, norm, FitOptions(shrinkage, l2), self._seed + number
                )
            except InvalidInput as error:
                raise InvalidInput(f"{site}: {error}") from error
        return Directions(vectors, source, target, method, norm, evidence)

    def _data(self, site: str, source: str, target: str) -> SiteData:
        at = self._at(site)
        s, t = self._halves(site, source), self._halves(site, target)
        pair, turned = (s[0] // 2, t[0] // 2), (t[0] // 2, s[0] // 2)
        return SiteData(
            at.statistics,
            (s[0], s[1]),
            (t[0], t[1]),
            at.pairs.get(pair) or at.pairs.get(turned),
            (at.held_rows(pair[0]), at.held_rows(pair[1])),
            at.steps,
            at.tokens,
        )

    def _enter(
        self, site: str, at: Gathered, rows: Tensor, numbers: Numbers, places: Numbers
    ) -> None:
        """Adds rows to the fit or to those that are kept out; the site is known from then on."""
        halves = self._split.of(places)
        out = np.flatnonzero(halves == HELD_OUT)
        held = rows[torch.from_numpy(out).to(rows.device)]
        slots = 2 * numbers
        slots += halves
        slots[out] = HELD_OUT
        try:
            if held.numel() and not all(bool(end.isfinite()) for end in held.aminmax()):
                raise InvalidInput("values are not finite")
            at.statistics.add(rows, torch.from_numpy(slots), 2 * len(self._labels))
        except InvalidInput as error:
            raise InvalidInput(f"{site}: {error}") from error
        at.hold(held, numbers[out])
        self._sites[site] = at

    def _site(self, site: str, found: SiteRows) -> Gathered:
        at = self._sites.get(site)
        if at is None:
            return Gathered(Statistics(self._keep), found.steps, found.tokens)
        if at.steps != found.steps:
            raise InvalidInput(f"{site}: steps are {span(found.steps)}, before {span(at.steps)}")
        if at.tokens != found.tokens:
            raise InvalidInput(f"{site}: {found.tokens} tokens were recorded, before {at.tokens}")
        return at

    def _numbers(self, site: str, labels: str | Sequence[str] | Tensor, count: int) -> Numbers:
        """int64 [count]; names that are new are entered."""
        if isinstance(labels, Tensor):
            numbers = labels.cpu().numpy()
            if numbers.dtype != np.int64 or numbers.shape != (count,):
                got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
                raise InvalidInput(f"{site}: label numbers must be int64 [{count}], got {got}")
            if count and not 0 <= numbers.min() <= numbers.max() < len(self._labels):
                got = f"{numbers.min()} .. {numbers.max()}"
                raise InvalidInput(
                    f"{site}: label numbers run over {got}, {len(self._labels)} labels are named"
                )
            return numbers
        names = [labels] * count if isinstance(labels, str) else list(labels)
        if len(names) != count:
            raise InvalidInput(f"{site}: {len(names)} labels for {count} rows")
        self._labels = list(dict.fromkeys([*self._labels, *names]))
        numbers = {name: number for number, name in enumerate(self._labels)}
        return np.array([numbers[name] for name in names], dtype=np.int64)

    def _at(self, site: str) -> Gathered:
        if site not in self._sites:
            raise UnknownName("site", site, self._sites)
        return self._sites[site]

    def _halves(self, site: str, label: str) -> list[int]:
        if label not in self._labels:
            raise UnknownName("label", label, self._labels)
        number = self._labels.index(label)
        if not self._at(site).statistics.count([2 * number, 2 * number + 1]):
            kept = len(self._at(site).held_rows(number))
            raise InvalidInput(f"{site}: label {label!r} has no rows in the fit, {kept} kept out")
        return [2 * number, 2 * number + 1]
