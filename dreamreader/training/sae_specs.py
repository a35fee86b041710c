"""Specs of trainings of sparse autoencoders: which ones, on which rows, and how."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dreamreader.errors import DreamreaderError
from dreamreader.sae.loss import AUX_RULES
from dreamreader.sae.model import resolve_widths
from dreamreader.sae.selection import Selection, check_selection, selection_from
from dreamreader.sae.synthetic import SyntheticConfig
from dreamreader.specs.call import CallArguments
from dreamreader.specs.parts import AnySeeds, AnySubject, Batch, Count, Data, Part, Seeds
from dreamreader.training.parts import Positive

Score = Literal["l2", "l2_squared", "entropy", "entropy_low", "leverage", "uniform"]
Control = Literal["random_decoder", "random_encoder", "shuffled"]
SWEPT = ("d_sae", "k", "l", "score", "rule", "sparsity")
_OF_SELECTION = (
    "k",
    "l",
    "score",
    "rule",
    "update_every",
    "sparsity",
    "bandwidth",
    "start",
    "warmup",
)


class AutoencoderSpec(Part):
    """One autoencoder; where a field has a list, one for each of its values."""

    selection: Literal["TopK", "BatchTopK", "SampledTopK", "JumpReLU"] = "BatchTopK"
    d_sae: Count | list[Count] = Field(description="Number of latents.")
    k: Positive | list[Positive] | None = Field(
        None, description="Active latents of a row; JumpReLU has none."
    )
    l: Positive | list[Positive] | None = Field(  # noqa: E741  the paper's name
        None, description="SampledTopK: columns of the pool for each active latent."
    )
    score: Score | list[Score] | None = Field(None, description="SampledTopK: of a column.")
    rule: Literal["top", "sampled"] | list[Literal["top", "sampled"]] | None = Field(
        None, description="SampledTopK: the top columns, or drawn by the score."
    )
    update_every: Count | None = Field(None, description="SampledTopK: steps of a pool.")
    sparsity: Positive | list[Positive] | None = Field(
        None, description="JumpReLU: weight of an active latent, from which thresholds learn."
    )
    bandwidth: Positive | None = Field(None, description="JumpReLU: window around a threshold.")
    start: Positive | None = Field(None, description="JumpReLU: thresholds before the first step.")
    warmup: Count | None = Field(None, description="JumpReLU: steps in which the weight rises.")
    groups: list[Count] | None = Field(None, description="Widths of Matryoshka prefixes.")
    rescale: bool = False
    normalise: Literal["none", "average_norm", "standardise", "constant_norm", "layer_norm"] = (
        "none"
    )
    aligned: bool = False
    decoder_norm: Positive = Field(1.0, description="Of decoder rows in the beginning.")
    threshold_rule: Literal["dictionary_learning", "saelens"] = "dictionary_learning"
    aux: Literal["dictionary_learning", "saelens", "none"] = "dictionary_learning"
    dead_after: Count | None = Field(
        None, description="Rows without firing after which aux-k takes a latent for dead."
    )

    @model_validator(mode="after")
    def _selections(self) -> "AutoencoderSpec":
        empty = [name for name in SWEPT if getattr(self, name) == []]
        if empty:
            raise ValueError(f"{empty[0]}: is empty")
        for each in self.each():
            try:
                assert isinstance(each.d_sae, int)
                check_selection(each.selection_for(0), each.d_sae)
                resolve_widths(each.groups, each.d_sae)
            except DreamreaderError as error:
                raise ValueError(str(error)) from None
        return self

    def each(self) -> "Iterator[AutoencoderSpec]":
        """One spec for each combination of listed values."""
        lists = {name: value for name in SWEPT if isinstance(value := getattr(self, name), list)}
        if not lists:
            yield self
            return
        for values in itertools.product(*lists.values()):
            yield self.model_copy(update=dict(zip(lists, values, strict=True)))

    def selection_for(self, seed: int) -> Selection:
        """The selection; the seed is of what it draws."""
        own = {name: getattr(self, name) for name in _OF_SELECTION}
        given = {name: value for name, value in own.items() if value is not None}
        if self.selection == "SampledTopK":
            given["seed"] = seed
        return selection_from({"name": self.selection, **given})

    @property
    def title(self) -> str:
        """Its name in tables."""
        shown = {name: getattr(self, name) for name in ("k", "l", "score", "rule", "sparsity")}
        parts = [
            f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in shown.items() if v
        ]
        more = [f"groups={'+'.join(map(str, self.groups))}"] if self.groups else []
        fields = type(self).model_fields
        names = ("update_every", "bandwidth", "start", "warmup", "rescale", "normalise", "aligned")
        for name in (*names, "decoder_norm", "threshold_rule", "aux", "dead_after"):
            if (value := getattr(self, name)) != fields[name].default:
                more.append(name if value is True else f"{name}={value}")
        return " ".join([self.selection, f"d={self.d_sae}", *parts, *more])

    def options(self) -> dict[str, Any]:
        """Arguments of `SparseAutoencoder` beside widths, selection and seed."""
        names = ("groups", "rescale", "normalise", "aligned", "decoder_norm")
        own = {name: getattr(self, name) for name in (*names, "threshold_rule", "aux")}
        if self.dead_after is not None:
            own["aux"] = replace(AUX_RULES[self.aux], dead_after=self.dead_after)
        return own


class KnownAnswers(Part):
    """Rows made of known features; by default those of SynthSAEBench-16k."""

    features: Count | None = None
    d_in: Count | None = None
    max_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    min_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    roots: Annotated[int, Field(ge=0)] | None = None
    depth: Annotated[int, Field(ge=0)] | None = None
    rank: Count | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> "KnownAnswers":
        try:
            self.config  # noqa: B018
        except DreamreaderError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def config(self) -> SyntheticConfig:
        return SyntheticConfig(**self.model_dump(exclude_none=True))


class SaeTraining(Part):
    """How long and how autoencoders are trained."""

    tokens: Count | None = Field(None, description="Rows in all; or give epochs.")
    epochs: Count | None = Field(None, description="Passes over a store.")
    batch_size: Count = 4096
    lr: Positive | None = Field(None, description="By default 2e-4 / sqrt(d_sae / 2^14).")
    warmup: Annotated[int, Field(ge=0)] | None = None
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "wsd"
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    grad_clip: Positive | None = 1.0
    k_start: Positive | None = Field(None, description="Active latents in the beginning.")
    k_steps: Count | None = Field(None, description="Steps over which they fall to k.")
    compute: Literal["float32", "bfloat16"] = "float32"
    device: str = Field("cpu", description="Of autoencoders; cuda: of torchrun, one each process.")
    save_every: Count = 1000

    @model_validator(mode="after")
    def _length(self) -> "SaeTraining":
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give one of tokens and epochs")
        if (self.k_start is None) != (self.k_steps is None):
            raise ValueError("k_start and k_steps belong together")
        if self.tokens is not None and self.tokens < self.batch_size:
            raise ValueError(f"tokens: fewer than a batch of {self.batch_size}")
        return self


class SaeEvaluation(Part):
    """What autoencoders are measured on."""

    rows: Count = Field(default=65_536, description="Rows that are measured.")
    store: str | None = Field(
        default=None, description="Folder of a harvest of other prompts; else rows of the training."
    )
    inference: Literal["own", "budget", "calibrated"] = Field(
        default="own",
        description="budget: k of all latents on average, whatever training or a threshold keeps; "
        "calibrated: the same by a threshold, from rows that are measured.",
    )
    curve: list[Count] = Field(
        default_factory=list, description="Rows of the training after which scores are taken too."
    )
    attributes: list[str] | None = Field(
        default=None,
        description="Columns of the data that latents are probed for, [] for none; by default what "
        "captions of scenes say.",
    )
    samples: Count = Field(default=256, description="Samples that are probed.")
    splice: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Prompts that are run with reconstructions in place; by default 16 of a model "
        "that is run, none of a store.",
    )


class SaeSpec(Part):
    """Autoencoders on rows of a store, of a model that is run first, or of known answers."""

    kind: Literal["sae"] = Field("sae", description="Of the job.")
    name: str = Field(min_length=1, max_length=80, description="Title; also names the folder.")
    autoencoders: list[AutoencoderSpec] = Field(min_length=1)
    store: str | None = Field(None, description="Folder of a harvest.")
    known_answers: KnownAnswers | None = None
    subject: AnySubject | None = None
    data: Data | None = None
    sites: str | list[str] | None = Field(
        None, description="Site strings or globs; of a store all by default."
    )
    branch: str | None = Field(None, description="Guidance branch; all by default.")
    steps: int | tuple[int, int] | None = Field(None, description="A step, or [start, stop].")
    tokens: int | list[int] | None = None
    prompt_seeds: AnySeeds = Field(
        default_factory=Seeds, description="Every prompt is run with every seed."
    )
    pipeline: CallArguments = Field(
        default_factory=dict, description="Arguments of the pipeline's call."
    )
    batch: Batch = Field(default_factory=Batch)
    training: SaeTraining
    evaluation: SaeEvaluation = Field(default_factory=SaeEvaluation)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: [0], min_length=1, description="Of autoencoders: one each."
    )
    controls: list[Control] = Field(
        default_factory=lambda: ["random_decoder", "random_encoder", "shuffled"],
        description="Trained beside the first seed of each autoencoder.",
    )
    keep_activations: bool = Field(
        False, description="Keeps the rows of a model that was run, beside the result."
    )

    @model_validator(mode="after")
    def _within(self) -> "SaeSpec":
        rows, late = self.training.tokens, self.evaluation.curve
        if rows is not None and late and max(late) > rows:
            raise ValueError(
                f"evaluation.curve: {max(late):,} rows are more than training.tokens, {rows:,}"
            )
        return self

    @field_validator("seeds")
    @classmethod
    def _once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is there twice")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "SaeSpec":
        given = {
            "store": self.store is not None,
            "known_answers": self.known_answers is not None,
            "subject": self.subject is not None,
        }
        if sum(given.values()) != 1:
            raise ValueError("give one of store, known_answers, and subject with data and sites")
        if self.subject is not None and (self.data is None or not self.sites):
            raise ValueError("subject needs data and sites")
        if self.subject is None and self.data is not None:
            raise ValueError("data are of prompts that are run; give subject")
        if self.known_answers is not None and (self.sites or self.evaluation.store):
            raise ValueError("known_answers have no sites and no stores")
        run = {name: getattr(self, name) for name in ("branch", "steps", "tokens")}
        given_of_run = [name for name, value in run.items() if value is not None]
        if self.known_answers is not None and given_of_run:
            raise ValueError(f"{given_of_run[0]}: known_answers have none")
        if self.subject is None and self.pipeline:
            raise ValueError("pipeline: is of a subject that is run")
        own = self.evaluation
        if self.known_answers is not None and (own.attributes or own.splice):
            given_there = "attributes" if own.attributes else "splice"
            raise ValueError(f"evaluation.{given_there}: is of a model, known_answers have none")
        if self.known_answers is not None and self.training.epochs:
            raise ValueError("training.epochs: known answers never end; give tokens")
        titles = [each.title for each in self.listed()]
        if twice := next((each for each in titles if titles.count(each) > 1), None):
            raise ValueError(f"autoencoders: {twice} is there twice")
        return self

    def listed(self) -> Sequence[AutoencoderSpec]:
        """Every autoencoder, one for each combination of listed values."""
        return [one for each in self.autoencoders for one in each.each()]

    @property
    def spliced(self) -> int:
        """Prompts that are run with reconstructions in place."""
        if self.evaluation.splice is not None:
            return self.evaluation.splice
        return 0 if self.subject is None else 16

    @property
    def chosen_steps(self) -> int | range | None:
        """As `Record` takes them."""
        return range(*self.steps) if isinstance(self.steps, tuple) else self.steps
