"""Stitching: sites of the subject get the mapped activations of another model."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from dreamreader.edits import Patch, Stitch
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, alphas, check_one_kind, check_size
from dreamreader.experiments.methods.stitch_maps import (
    MEAN,
    RANDOM,
    AnyMap,
    AnyPair,
    MapFitter,
    MapKey,
    MapSpec,
    SitePair,
    load_or_fit,
)
from dreamreader.experiments.row import Row
from dreamreader.jobs.subject import hash_weights
from dreamreader.mapping import ActivationMap, AffineMap, LockStep, lock_step
from dreamreader.mapping.stitch import only_site, record_encoders, record_texts
from dreamreader.metrics.next_token_kl import NextTokenKl
from dreamreader.recording.pairs import in_denoiser
from dreamreader.specs.call import CallArguments
from dreamreader.specs.data import read_items
from dreamreader.specs.parts import AnySeeds, AnySubject, Count, Data, Seeds, listed_seeds
from dreamreader.specs.subject import (
    call_settings,
    forward_settings,
    open_subject,
    with_padding,
)
from dreamreader.sweep import Cell

OF_PIPELINES = ("branch", "schedule", "trajectory", "source_pipeline")  # fields
CONTROLS = {"mean_ablated": MEAN, "random_map": RANDOM}


class StitchMethod(Method):
    """Maps activations of a source model to those of the subject, and runs the subject on them.

    Of language models, all tokens of the prompt that belong to one of the source are replaced.

    Maps are fitted to prompts of `fit`; the prompts of `data` are drawn with each site replaced.
    Controls: the site's mean (`mean_ablated`), without whose harm a site proves nothing, and a
    random linear map of the same variance (`random_map`).
    """

    kind: Literal["stitch"] = "stitch"
    source: AnySubject = Field(description="The model whose activations are mapped.")
    sites: list[AnyPair] = Field(  # pyright: ignore
        min_length=1, description="Sites, of one name in both or as source and target; each alone."
    )
    fit: Data = Field(description="Prompts that maps are fitted to; the last are held out.")
    fit_seeds: AnySeeds = Field(
        default_factory=lambda: Seeds(start=100_000), description="Seeds of the prompts to fit."
    )
    held_out: float = Field(
        0.2, gt=0, lt=1, description="Share of the prompts of fit that maps are scored on."
    )
    maps: list[AnyMap] = Field(  # pyright: ignore
        min_length=1, description="Methods of `fit_map`, or mappings with method and options."
    )
    amounts: list[Count] | None = Field(
        None, min_length=1, description="Numbers of prompts that maps are fitted to; all."
    )
    strengths: list[float] = Field(
        default_factory=lambda: [1.0], min_length=1, description="0 is the subject's own."
    )
    branch: str | list[str] | None = Field(None, description="Guidance branch; all by default.")
    schedule: Literal["equal", "noise", "fraction", "target"] = Field(
        "equal",
        description="Which calls belong together; target: the source at the subject's levels.",
    )
    trajectory: Literal["target", "own"] = Field(
        "target", description="Latents that the source sees: those of the subject, or its own."
    )
    align: Literal["index", "place", "spans"] | None = Field(
        None,
        description="Tokens of one number (of pipelines the default), places of grids of other "
        "sizes, or pieces of the text that both language models cut (their default).",
    )
    skip: int = Field(0, ge=0, description="First pairs of tokens of each text that are left out.")
    source_pipeline: CallArguments = Field(
        default_factory=dict, description="Arguments of the source's call beside `pipeline`."
    )
    effect: str | None = Field(None, description="Column of a metric that success is read from.")
    controls: list[Literal["mean_ablated", "random_map"]] = Field(
        default_factory=lambda: ["mean_ablated", "random_map"]
    )

    @model_validator(mode="after")
    def _nothing_twice(self) -> "StitchMethod":
        axes: dict[str, Sequence[Any]] = {
            "sites": [each.label for each in self.sites],
            "maps": [each.label for each in self.maps],
            "amounts": self.amounts or [],
            "strengths": self.strengths,
        }
        for name, values in axes.items():
            again = next((v for v in values if values.count(v) > 1), None)
            if again is not None:
                raise ValueError(f"{name}: {again} is there twice")
        return self

    def check(self, job: Job) -> None:
        check_one_kind(self.source.model, self.reader, job)
        self._check_language(job) if job.is_language else self._check_pipelines()
        each = len(self.maps) * len(self._amounts()) * len(self.strengths) + len(self.controls)
        check_size(
            prompts=len(job.items), seeds=len(job.seeds), pairs=len(self.sites), settings=each
        )
        source = self.reader
        for pair in self.sites:
            for reader, site in ((source, pair.source), (job.reader, pair.target)):
                try:
                    only_site(reader, site)
                except InvalidInput as error:
                    raise InvalidInput(f"method.sites: {error}") from error
        inside = {in_denoiser(source, [pair.source]) for pair in self.sites}
        if len(inside) > 1:
            raise InvalidInput(
                "method.sites: some sites are in the denoiser and some are not; write a spec for "
                "each"
            )

    def _check_pipelines(self) -> None:
        if self.align == "spans":
            raise InvalidInput("method.align: spans are of language models; choose index or place")
        if self.skip:
            raise InvalidInput("method.skip: is of texts of language models; leave it out")

    def _check_language(self, job: Job) -> None:
        if self.align == "place":
            raise InvalidInput("method.align: places are of pictures; choose spans or index")
        for name in OF_PIPELINES:
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) != default:
                raise InvalidInput(
                    f"method.{name}: is of denoisers, which a language model has not; leave it out"
                )
        measured = any(metric.name == NextTokenKl.name for metric in job.metrics)
        if measured and "mean_ablated" not in self.controls:
            raise InvalidInput(
                "method.controls: next_token_kl is 0 without a stitch, so shares are of that of "
                "the mean; add mean_ablated"
            )

    def inputs(self, job: Job) -> dict[str, Any]:
        prompts = [item.prompt for item in read_items(self.fit, "method.fit")]
        return {
            "fit": hashlib.sha256(repr(prompts).encode()).hexdigest(),
            "source": hash_weights(self.reader.subject),
        }

    @cached_property
    def reader(self) -> Reader:
        """Of the source, opened once."""
        return with_padding(open_subject(self.source))

    def rows(self, job: Job) -> list[Row]:
        table = RowTable()
        pairs = table.add_unedited(job, [])
        for condition, pair, label, amount, strengths in self._sweeps():
            cell = Cell(pair.label, (pair.target,))
            axes = {"map": label, "fit_prompts": amount}
            for strength in strengths:
                table.next_group()  # a batch runs the source for one pair alone
                for n, (item, seed) in enumerate(pairs):
                    table.add(
                        item, seed, condition, cell=cell, strength=strength, entry=n, axes=axes
                    )
        return table.rows

    def prepare(self, job: Job) -> None:
        """Maps of the run folder; those that are missing are fitted and written there."""
        fitter = self._fitter(job)
        keys = {(pair.label, key.label, key.amount): (key, spec)
                for pair, key, spec in self._keys()}  # fmt: skip
        made = load_or_fit(fitter, list(keys.values()))
        job.memory["maps"] = {name: made[key] for name, (key, _) in keys.items()}
        job.memory["sources"] = self._sources(job, fitter)

    def edits_of(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        job.memory["following"] = None
        sources = job.memory["sources"]
        found: list[Any] = []
        for (condition, cell, label, amount), strength in alphas(
            rows, "map", "fit_prompts"
        ).items():
            pair = next(each for each in self.sites if each.label == cell.name)
            site = only_site(self.reader, pair.source)
            own: ActivationMap = job.memory["maps"][cell.name, label, amount]
            more: dict[str, Any] = {"strength": strength, "branch": self.branch}
            if isinstance(sources, LockStep):
                more["steps"] = sources.steps
            if job.is_language:  # at the prompt's tokens that the source has, whatever the map
                more |= {"steps": 0, "partial": self.skip > 0 or self._alignment(job) == "spans"}
            elif condition == "mean_ablated":  # which asks nothing of the source
                assert isinstance(own, AffineMap)
                found.append(Patch(cell.sites, own.bias, **more))
                continue
            entries = [row.entry for row in rows]
            if isinstance(sources, LockStep):
                run = (job.memory["following"] or sources).reading(site)
                job.memory["following"] = run
                found.append(Stitch(cell.sites, run.at(site, entries), own, **more))
            else:
                found.append(Stitch(cell.sites, sources[site], own, from_rows=entries, **more))
        return found

    def around(self, job: Job) -> AbstractContextManager[Any]:
        following: LockStep | None = job.memory.get("following")
        return nullcontext() if following is None else following.follow()

    def compared_tokens(self, job: Job, rows: Sequence[Row]) -> Tensor | None:
        """The tokens that the source has a partner of."""
        if not job.is_language:
            return None
        (places, *_) = (each.positions for each in job.memory["sources"].values())
        return places[[row.entry for row in rows], 0]

    def _alignment(self, job: Job) -> str:
        return self.align or ("spans" if job.is_language else "index")

    def _amounts(self) -> list[int]:
        items = read_items(self.fit, "method.fit")
        most = len(items) - max(1, round(self.held_out * len(items)))
        if most < 1:
            raise InvalidInput(
                f"method.fit: {len(items)} prompts leave none to fit to beside those held out"
            )
        for each in self.amounts or ():
            if each > most:
                raise InvalidInput(
                    f"method.amounts: {each} prompts are asked for, fit has {len(items)}, of which "
                    f"{most} are not held out"
                )
        return sorted(self.amounts or [most])

    def _sweeps(self) -> Iterator[tuple[str, SitePair, str, int, list[float]]]:
        """Condition, pair, map, prompts and strengths of all that is run."""
        amounts = self._amounts()
        for pair in self.sites:
            for condition in self.controls:
                yield condition, pair, CONTROLS[condition], amounts[-1], [1.0]
            for own in self.maps:
                for amount in amounts:
                    yield "stitched", pair, own.label, amount, self.strengths

    def _keys(self) -> Iterator[tuple[SitePair, MapKey, MapSpec | None]]:
        specs = {each.label: each for each in self.maps}
        for condition, pair, label, amount, _ in self._sweeps():
            spec = specs[label] if condition == "stitched" else None
            yield pair, MapKey(pair, label, amount), spec

    def _fitter(self, job: Job) -> MapFitter:
        source = self.reader
        if job.is_language:
            settings = forward_settings(source), forward_settings(job.reader)
        else:
            asked = {**job.spec.pipeline, **self.source_pipeline}
            settings = call_settings(source, self.source, asked), job.settings
        branch = [self.branch] if isinstance(self.branch, str) else self.branch
        guided = ("cond", "uncond") if job.prompt_branch else ("cond",)
        return MapFitter(
            job,
            source,
            (self.source.model, job.spec.subject.model),
            read_items(self.fit, "method.fit"),
            listed_seeds(self.fit_seeds),
            self.held_out,
            self.schedule,
            self.trajectory,
            self._alignment(job),
            branch or guided,
            settings,
            self.skip,
        )

    def _sources(self, job: Job, fitter: MapFitter) -> Any:
        """The source in lock-step, or what it has outside its denoiser, for every row."""
        pairs = [(item.prompt, seed) for item in job.items for seed in job.seeds]
        prompts, seeds = map(list, zip(*pairs, strict=True))
        sites = list(dict.fromkeys(only_site(fitter.source, each.source) for each in self.sites))
        if job.is_language:
            places = [only_site(job.reader, self.sites[0].target)]
            return record_texts(
                fitter.source, job.reader, prompts, sites, places, align=fitter.align,
                batch_size=job.batch, skip=self.skip,
                source_arguments=fitter.settings[0], target_arguments=fitter.settings[1],
            )  # fmt: skip
        asked: dict[str, Any] = {"seeds": seeds, "batch_size": job.batch, "progress": False}
        if not in_denoiser(fitter.source, sites):
            return record_encoders(fitter.source, prompts, sites, **asked, **fitter.settings[0])
        return lock_step(
            fitter.source, job.reader, prompts, sites,
            schedule=self.schedule, trajectory=self.trajectory,
            source_arguments=fitter.settings[0], target_arguments=fitter.settings[1], **asked,
        )  # fmt: skip
