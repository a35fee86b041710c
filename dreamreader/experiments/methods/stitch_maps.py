"""The maps of stitching experiments: recorded, fitted, kept in the run folder with their scores."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from dreamreader._checked import write_json
from dreamreader._files import explain_disk_errors
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job
from dreamreader.mapping import METHODS, ActivationMap, AffineMap, PairedRows, fit_map, score_map
from dreamreader.mapping.fit import BY_GRADIENT
from dreamreader.recording import record_between
from dreamreader.recording.pairs import in_denoiser
from dreamreader.specs.data import Item
from dreamreader.specs.maps import MapOptions
from dreamreader.specs.parts import Part, Shorthand

MEAN, RANDOM = "mean", "random"


class MapSpec(Part):
    """How a map is fitted."""

    method: Literal[METHODS] = Field(description="See `dreamreader.mapping.fit_map`.")  # pyright: ignore
    name: str | None = Field(None, description="In tables; method and options by default.")
    options: MapOptions = Field(
        default_factory=dict, description="Of the method, such as k; recipe as a mapping."
    )

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name or " ".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])


_METHOD = Shorthand("method")
AnyMap = Annotated[
    MapSpec, BeforeValidator(_METHOD.expand, json_schema_input_type=str | MapSpec), _METHOD
]


class SitePair(Part):
    """A site of the source and the site of the target that gets it."""

    source: str
    target: str

    @property
    def label(self) -> str:
        """One name where both are the same."""
        return self.target if self.source == self.target else f"{self.source} > {self.target}"


def _both(value: Any) -> Any:
    return {"source": value, "target": value} if isinstance(value, str) else value


AnyPair = Annotated[SitePair, BeforeValidator(_both, json_schema_input_type=str | SitePair)]


@dataclass(frozen=True)
class MapKey:
    """A map of a run: of which sites, by what, and from how many prompts."""

    pair: SitePair
    label: str
    amount: int

    @property
    def file(self) -> str:
        """Its name without an ending."""
        text = repr((self.pair.source, self.pair.target, self.label, self.amount))
        return f"map-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(eq=False)
class MapFitter:
    """Fits the maps of a pair of sites from recordings of both models.

    Args:
        job: of the target. source: reader of the other model. names: of both, for cards.
        items, seeds: that are recorded. held: share of the prompts that scores are taken on.
        settings: arguments of the source's and of the target's call. skip: see `record_between`.
    """

    job: Job
    source: Reader
    names: tuple[str, str]
    items: Sequence[Item]
    seeds: Sequence[int]
    held: float
    schedule: str
    trajectory: str
    align: str
    branches: Sequence[str]
    settings: tuple[dict[str, Any], dict[str, Any]]
    skip: int = 0

    @property
    def most(self) -> int:
        """Prompts that maps can be fitted to."""
        return len(self.items) - max(1, round(self.held * len(self.items)))

    def record(self, pair: SitePair) -> tuple[PairedRows, PairedRows]:
        """Pairs to fit maps to, and held out: the last prompts."""
        prompts = [item.prompt for item in self.items for _ in self.seeds]
        seeds = [seed for _ in self.items for seed in self.seeds]
        order = [number for number in range(len(self.items)) for _ in self.seeds]
        inside = in_denoiser(self.source, [pair.source])
        if inside != in_denoiser(self.job.reader, [pair.target]):
            raise InvalidInput(
                f"method.sites: {pair.source} and {pair.target} are not both in a denoiser, so "
                "their calls have no partners"
            )
        if not inside and not self.job.is_language:  # other branches read the empty text
            prompts, seeds, order = [*prompts, ""], [*seeds, 0], [*order, 0]
        parts = []
        for branch in self.branches if inside else self.branches[:1]:
            more: dict[str, Any] = {"branch": branch, "align": self.align}
            if inside:
                more |= {"schedule": self.schedule, "trajectory": self.trajectory}
            found = record_between(
                self.source, self.job.reader, prompts, pair.source, pair.target,
                seeds=seeds, skip=self.skip, batch_size=self.job.batch, progress=False,
                source_arguments=self.settings[0], target_arguments=self.settings[1], **more,
            )  # fmt: skip
            (one,), (other,) = found.source, found.target  # by their full names
            rows = PairedRows.of(found, one, other)
            groups = torch.tensor(order).repeat_interleave(found.calls)
            parts.append(replace(rows, groups=groups))
        rows = _joined(parts)
        assert rows.groups is not None
        return rows.select(rows.groups < self.most), rows.select(rows.groups >= self.most)

    def fit(self, key: MapKey, spec: MapSpec | None, rows: PairedRows) -> ActivationMap:
        """The map of a key; without a spec, one of the controls."""
        assert rows.groups is not None
        own = rows.select(rows.groups < key.amount)
        one, other = self.names
        if key.label == RANDOM:
            return random_map(own).with_card(
                source_model=one, target_model=other,
                source_site=own.source_site, target_site=own.target_site,
            )  # fmt: skip
        method, options = (MEAN, {}) if spec is None else (spec.method, spec.options)
        try:
            options = fit_options(method, options)
            return fit_map(own, method, source_model=one, target_model=other, **options)
        except InvalidInput as error:
            where = f"{key.pair.label}, {key.label}, {key.amount} prompts"
            raise InvalidInput(f"method.maps ({where}): {error}") from error


def fit_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a spec for `fit_map`, which shows no progress of a training within a job."""
    trained = options.get("each", method) in BY_GRADIENT
    return {**options, **({"progress": False} if trained else {})}


def _joined(parts: Sequence[PairedRows]) -> PairedRows:
    """Pairs of several branches as one, sequence after sequence."""

    def cat(name: str) -> Tensor | None:
        values = [getattr(each, name) for each in parts]
        return None if values[0] is None else torch.cat(values)

    names = ("x", "y", "weights", "groups", "steps", "levels")
    return replace(parts[0], **{name: cat(name) for name in names})


def random_map(rows: PairedRows, seed: int = 0) -> AffineMap:
    """A linear map between the means with normal entries, that gives as much variance as there is.

    Args:
        rows: pairs, whose means and variances it has. seed: of the entries.
    """
    moments = rows.moments()
    mean, scatter = moments.source_mean, moments.source_scatter
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(moments.d_target, moments.d_source, generator=draw).to(scatter)
    given = ((weight @ scatter) * weight).sum()
    weight = weight * (moments.target_squares.sum() / given.clamp(min=1e-300)).sqrt()
    bias = moments.target_mean - weight @ mean
    values = [each.float().cpu() for each in (mean, weight, bias)]
    return AffineMap(*values).with_card(method=RANDOM)


def load_or_fit(
    fitter: MapFitter, wanted: Sequence[tuple[MapKey, MapSpec | None]]
) -> dict[MapKey, ActivationMap]:
    """The maps of a run folder; those that are missing are fitted, scored and written there."""
    assert fitter.job.folder is not None
    folder = fitter.job.folder.path / "artifacts"
    files = {key: folder / f"{key.file}.safetensors" for key, _ in wanted}
    for pair in dict.fromkeys(key.pair for key, _ in wanted):
        missing = [(k, s) for k, s in wanted if k.pair == pair and not files[k].is_file()]
        if missing:
            rows, held = fitter.record(pair)
            for key, spec in missing:
                _write(fitter.fit(key, spec, rows), key, held, files[key])
    return {key: ActivationMap.load(file) for key, file in files.items()}


def _write(own: ActivationMap, key: MapKey, held: PairedRows, file: Path) -> None:
    found = score_map(own, held, draws=20).as_dict()
    scores = {name: found[name] for name in ("rows", "fvu", "r2", "cosine", "cka", "retrieval")}
    note = {"pair": key.pair.label, "map": key.label, "prompts": key.amount}
    with explain_disk_errors(file.parent.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file.with_suffix(".json"), note | {"scores": scores})
        own.with_card(scores=scores).save(file)
