"""Specs of trainings: what adapters and probes are trained on, where, and how."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dreamreader.errors import DreamreaderError
from dreamreader.specs import parts
from dreamreader.specs.call import CallArguments
from dreamreader.specs.parts import AnySeeds, AnySubject, Batch, Data, Part, Seeds, listed_seeds
from dreamreader.training.labels import Named, check_detected, from_detector
from dreamreader.training.parts import ProbeTraining, Training


class ReftSpec(parts.Common):
    """Adapters: subject, pairs of prompts (or completions, or pictures), sites, training."""

    kind: Literal["reft"] = Field("reft", description="Of the job.")
    sites: str | list[str] = Field(min_length=1, description="Site strings or globs.")
    branch: str = Field("cond", description="Guidance branch that is trained and edited.")
    tokens: int | list[int] | None = Field(None, description="Which tokens are edited; all.")
    training: Training = Field(default_factory=Training)

    @model_validator(mode="after")
    def _rows(self) -> "ReftSpec":
        if self.training.loss in ("language", "denoising") and self.data.scenes is not None:
            raise ValueError(
                f"data.scenes: the loss {self.training.loss} needs a column that scenes have not"
            )
        return self


class ProbeSpec(Part):
    """Probes: activations of prompts (`subject`, `data`) or of a `store`, labels, training."""

    kind: Literal["probes"] = Field("probes", description="Of the job.")
    name: str = Field(min_length=1, max_length=80, description="Title; also names the folder.")
    subject: AnySubject | None = None
    data: Data | None = None
    store: str | None = Field(None, description="Folder of a harvest, instead of subject and data.")
    labels: Named = Field(
        description="A column, several, {attribute: column}, or {detector: attribute}."
    )
    sites: str | list[str] | None = Field(
        None, description="Site strings or globs; of a store all by default."
    )
    branch: str = "cond"
    steps: int | tuple[int, int] | None = Field(None, description="A step, or [start, stop].")
    tokens: int | list[int] | None = None
    seeds: AnySeeds = Field(
        default_factory=Seeds, description="Every prompt is run with every seed."
    )
    pipeline: CallArguments = Field(
        default_factory=dict, description="Arguments of the pipeline's call."
    )
    batch: Batch = Field(default_factory=Batch)
    probe: ProbeTraining = Field(default_factory=ProbeTraining)

    @field_validator("labels")
    @classmethod
    def _some(cls, value: Named) -> Named:
        if not value:
            raise ValueError("is empty")
        if from_detector(value):
            if isinstance(value, dict) and len(value) > 1:
                raise ValueError("detector stands alone: {detector: [color, background]}")
            try:
                check_detected(value)
            except DreamreaderError as error:
                raise ValueError(str(error)) from None
        elif isinstance(value, dict) and any(not isinstance(each, str) for each in value.values()):
            raise ValueError("each attribute has one column")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "ProbeSpec":
        run = ("subject", "data", "seeds", "pipeline", "batch")
        fields = type(self).model_fields  # a spec with all its defaults is one with a store too
        given = [
            name
            for name in run
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if self.store is None:
            missing = [name for name in ("subject", "data", "sites") if not getattr(self, name)]
            if missing:
                raise ValueError(f"{missing[0]} is missing; or give store, the folder of a harvest")
        elif given:
            raise ValueError(f"{given[0]} is of prompts that are run; a store has its own")
        elif from_detector(self.labels):
            raise ValueError("labels: a store has no pictures for the detector; give a column")
        elif self.probe.jitter:
            raise ValueError("probe.jitter: rows of a store are read as they are; leave it out")
        return self

    @property
    def seed_list(self) -> Sequence[int]:
        return listed_seeds(self.seeds)

    @property
    def chosen_steps(self) -> int | range | None:
        """As `Record` takes them."""
        return range(*self.steps) if isinstance(self.steps, tuple) else self.steps
