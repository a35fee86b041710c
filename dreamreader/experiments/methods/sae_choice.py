"""Latents chosen by what they do: candidates by means of labels, then runs that compare them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from dreamreader.engine import Activation, Record, one_branch
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments.job import Job
from dreamreader.ops import sparse_column_sums
from dreamreader.sae import SparseAutoencoder
from dreamreader.specs.data import Item, read_items
from dreamreader.specs.parts import AnySeeds, Count, Data, Part, Seeds, listed_seeds
from dreamreader.steering import LabelMeans

MEANS = "latents"  # tensors of the run folder
LEVELS = 0.85, 1.2  # what a level is multiplied with where a set is changed


@dataclass(frozen=True)
class FeatureSet:
    """Latents that are changed together.

    Attributes:
        features: their numbers. levels: what a strength multiplies, for each; one everywhere
            where None.
        where: latents of which one must be active where these are changed; everywhere if None.
    """

    features: tuple[int, ...]
    levels: tuple[float, ...] | None = None
    where: tuple[int, ...] | None = None

    def values(self, strength: float) -> float | list[float]:
        """What `SAEEdit` takes as value."""
        return strength if self.levels is None else [strength * each for each in self.levels]


@dataclass(frozen=True, eq=False)
class LatentMeans:
    """What latents and activations are in pictures of each label.

    Attributes:
        labels: in alphabetic order. contrasts: mean code less that of the other labels.
        levels: mean code where a latent is active; 0 where it never is.
        differences: of mean activations, one label less the others.
    """

    labels: tuple[str, ...]
    contrasts: Float[Tensor, "labels d_sae"]
    levels: Float[Tensor, "labels d_sae"]
    differences: Float[Tensor, "labels d_in"]

    def candidates(self, label: str, count: int) -> list[FeatureSet]:
        """Single latents that are more active in a label than elsewhere, most first."""
        n = self.labels.index(label)
        order = self.contrasts[n].argsort(descending=True, stable=True)[:count].tolist()
        kept = [j for j in order if self.contrasts[n, j] > 0]
        return [FeatureSet((j,), (float(self.levels[n, j]),)) for j in kept]

    def by_contrast(self, label: str, size: int, both: bool) -> FeatureSet:
        """The latents that differ most; with `both` also those that the label lacks, at 0."""
        n = self.labels.index(label)
        contrast = self.contrasts[n]
        order = (contrast.abs() if both else contrast).argsort(descending=True, stable=True)
        kept = [j for j in order[:size].tolist() if both or contrast[j] > 0]
        levels = [float(self.levels[n, j]) if contrast[j] > 0 else 0.0 for j in kept]
        return FeatureSet(tuple(kept), tuple(levels))

    def by_label(self, label: str, rivals: Sequence[str], size: int, on: int) -> FeatureSet:
        """The first `on` of a label, and at 0 the first of its rivals, at most `size`."""
        first = self.candidates(label, on)
        kept = {each.features[0]: (each.levels or (0.0,))[0] for each in first}
        for other in self.marks(rivals, max(1, (size - on) // len(rivals))):
            if len(kept) < size:
                kept.setdefault(other, 0.0)
        return FeatureSet(tuple(kept), tuple(kept.values()))

    def neighbours(
        self,
        latents: FeatureSet,
        label: str,
        rivals: Sequence[str],
        size: int,
        more: int,
        shares: Sequence[float] = LEVELS,
    ) -> list[FeatureSet]:
        """Sets of at most a size that differ in one thing: a latent joins, out of the `more` first
        of the label or, at 0, of its rivals; one is left out; one or all have a share of the level.
        """
        own = dict(zip(latents.features, latents.levels or (), strict=True))
        joining = dict.fromkeys(self.marks(rivals, max(1, more // max(1, len(rivals)))), 0.0)
        for each in self.candidates(label, more):
            joining |= zip(each.features, each.levels or (), strict=True)
        room = len(own) < size
        sets = [own | {j: level} for j, level in joining.items() if room and j not in own]
        if len(own) > 1:
            sets += [{j: own[j] for j in own if j != left} for left in own]
        switched_on = [j for j, level in own.items() if level]
        moved = [[j] for j in switched_on] + [switched_on] * (len(switched_on) > 1)
        sets += [own | {j: own[j] * share for j in each} for each in moved for share in shares]
        return [FeatureSet(tuple(each), tuple(each.values()), latents.where) for each in sets]

    def marks(self, labels: Sequence[str], count: int) -> tuple[int, ...]:
        """The first latents of each of these labels: where one is active, there is a label."""
        found = [each.features[0] for label in labels for each in self.candidates(label, count)]
        return tuple(dict.fromkeys(found))


class LatentChoice(Part):
    """Chooses latents for each label of pictures, by what changing them does to pictures apart from
    those of `data`.

    Candidates differ most between the mean codes of one label and of the others, over `fit`. Each
    candidate, and each set, is tried on pictures of `trial` at every strength of the method; what
    succeeds most often is kept: `success` reached (or, for `remove`, left) with `kept` true.
    A strength of 1 is the mean code of the label where a latent is active.
    """

    label: str = Field(description="Column of all prompts with the label of a picture.")
    targets: list[str] | None = Field(None, description="Labels; all of fit by default.")
    against: str | None = Field(
        None, description="Label that pictures are changed from; all others by default."
    )
    goal: Literal["add", "remove"] = Field(
        "add", description="Add the label to pictures of others, or remove it from its own."
    )
    fit: Data = Field(description="Prompts whose codes are averaged by label.")
    fit_seeds: AnySeeds = Field(default_factory=lambda: Seeds(start=100_000))
    trial: Data = Field(description="Prompts on which candidates are tried.")
    trial_seeds: AnySeeds = Field(default_factory=lambda: Seeds(start=200_000))
    trial_rows: Count = Field(8, description="Pictures for each candidate and strength.")
    candidates: Count = Field(12, description="Single latents that are tried for each label.")
    sizes: list[Count] = Field(
        default_factory=lambda: [1, 16], min_length=1, description="Most latents of a set."
    )
    rounds: int = Field(
        0,
        ge=0,
        description="How often each of the best three sets of a size is changed in one thing, a "
        "latent more, less, stronger or weaker: by what does most, as long as that does more.",
    )
    where: Count | None = Field(
        None,
        description="Change only tokens at which one of so many latents is active, of each label "
        "that pictures are changed from; all tokens by default.",
    )
    success: str = Field("turned", description="Column of a metric.")
    kept: str = Field("others_kept", description="Column of a metric.")

    @model_validator(mode="after")
    def _once(self) -> "LatentChoice":
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError("sizes: a size is there twice")
        if self.against is not None and self.against in (self.targets or ()):
            raise ValueError(f"against: {self.against} is one of targets; take another label")
        return self

    def items(self, part: Literal["fit", "trial"]) -> list[Item]:
        """The prompts of a part.

        Raises:
            InvalidInput: one has no label.
        """
        found = read_items(getattr(self, part), f"method.choose.{part}")
        for item in found:
            self.label_of(item, f"method.choose.{part}")
        return found

    def digest(self) -> str:
        """Of the prompts that are chosen by, and of their labels."""
        items = [*self.items("fit"), *self.items("trial")]
        listed = [[each.prompt, self.label_of(each)] for each in items]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    def label_of(self, item: Item, where: str = "data") -> str:
        """The label of a prompt.

        Raises:
            InvalidInput: it has none.
        """
        value = item.columns.get(self.label)
        if value is None:
            there = ", ".join(item.columns) or "none"
            raise InvalidInput(
                f"method.choose.label: entry {item.id!r} of {where} has no value in the column "
                f"{self.label}; it has {there}"
            )
        return str(value)

    def labels(self) -> list[str]:
        """Labels that latents are chosen for.

        Raises:
            UnknownName: one of `targets` is none of the fit.
            InvalidInput: the fit has one label alone.
        """
        known = sorted({self.label_of(item) for item in self.items("fit")})
        if len(known) < 2:
            raise InvalidInput(f"method.choose.fit: {known[0]!r} is the only label of {self.label}")
        for each in (*(self.targets or ()), *((self.against,) if self.against else ())):
            if each not in known:
                raise UnknownName("label of method.choose", each, known)
        return list(self.targets or (each for each in known if each != self.against))

    def concerns(self, item: Item, target: str) -> bool:
        """Whether a picture is one to change: of other labels, or to remove, of this one."""
        own = self.label_of(item)
        return own == target if self.goal == "remove" else own in self.rivals(own, target)

    def rivals(self, labels: str | Sequence[str], target: str) -> list[str]:
        """Those of some labels that a target is added to."""
        listed = [labels] if isinstance(labels, str) else labels
        return [each for each in listed if each != target and self.against in (None, each)]

    def marks(self, means: LatentMeans, label: str) -> tuple[int, ...] | None:
        """Latents that say which tokens are changed; None for all."""
        if self.where is None:
            return None
        others = self.rivals(means.labels, label)
        return means.marks(others if self.goal == "add" else [label], self.where)

    def names(self) -> Iterator[tuple[str, str]]:
        """Every set to be chosen: its name and its label."""
        for label in self.labels():
            for size in self.sizes:
                yield set_name(label, size), label

    def succeeded(self, row: Mapping[str, Any]) -> bool:
        """Whether a changed picture is what was wanted, with all else kept."""
        return self.reached(row) and bool(row[self.kept])

    def reached(self, row: Mapping[str, Any]) -> bool:
        """Whether the label is there (`add`) or gone (`remove`)."""
        return bool(row[self.success]) == (self.goal == "add")


def load_or_measure(
    job: Job, choice: LatentChoice, sae: SparseAutoencoder, site: str, options: Mapping[str, Any]
) -> LatentMeans:
    """The means of a run folder; measured and written there where they are missing."""
    assert job.folder is not None
    tensors = job.folder.tensors(MEANS)
    names = sorted({choice.label_of(item) for item in choice.items("fit")})
    if tensors is None:
        found = measure_means(job, choice, sae, site, options)
        own = {name: getattr(found, name) for name in ("contrasts", "levels", "differences")}
        job.folder.keep_tensors(MEANS, own)
        return found
    return LatentMeans(tuple(names), **tensors)


def set_name(label: str, size: int) -> str:
    """The name of a chosen set."""
    return f"{label}, one" if size == 1 else f"{label}, up to {size}"


def measure_means(
    job: Job, choice: LatentChoice, sae: SparseAutoencoder, site: str, options: Mapping[str, Any]
) -> LatentMeans:
    """Means of codes and activations by label, from a recording of the fit's prompts.

    Args:
        site: where the autoencoder was trained. options: of `Record`.
    """
    rows = [(item, seed) for item in choice.items("fit") for seed in listed_seeds(choice.fit_seeds)]
    labels = [choice.label_of(item) for item, _ in rows]
    means, done = LabelMeans(), 0
    batches = job.record(
        [(item.prompt, seed) for item, seed in rows], [Record(site, **dict(options))]
    )
    for cache in batches:
        (activation,) = cache.values()
        count = len(activation.rows)
        codes, active = _mean_codes(sae, activation)
        found = {"x": activation, "codes": codes, "active": active}
        means.add(found, labels[done : done + count])
        done += count
    names = means.labels
    level = [means.mean("codes", n) / means.mean("active", n).clamp(min=1e-12) for n in names]
    return LatentMeans(
        tuple(names),
        torch.stack([_contrast(means, choice, "codes", name)[0] for name in names]),
        torch.stack([each[0] for each in level]).float(),
        torch.stack([_contrast(means, choice, "x", name).mean(0) for name in names]),
    )


def _contrast(means: LabelMeans, choice: LatentChoice, of: str, label: str) -> Tensor:
    """What a label's mean has beside that of the label it is changed from, or of all others."""
    if choice.against in (None, label):
        return means.contrast(of, label)
    return means.difference(of, choice.against, label)


def _mean_codes(
    sae: SparseAutoencoder, activation: Activation
) -> tuple[Float[Tensor, "rows 1 d_sae"], Float[Tensor, "rows 1 d_sae"]]:
    """Of each row over steps and tokens: the mean code, and how often it is above 0."""
    values, padding = one_branch(activation.site, activation), activation.padding
    codes, active = [], []
    for number, row in enumerate(values):
        x = row.reshape(-1, row.shape[-1]) if padding is None else row[~padding[number]]
        with torch.no_grad():
            found = sae.encode_sparse(x.to(sae.W_dec.device, sae.W_dec.dtype))
            codes.append(sparse_column_sums(found).double() / len(x))
            active.append(found.column_counts().double() / len(x))
    return torch.stack(codes).unsqueeze(1), torch.stack(active).unsqueeze(1)
