"""Spec of a matrix of maps: two models, their sites, prompts, and what is fitted."""

from typing import Literal

from pydantic import Field, model_validator

from dreamreader.specs import parts
from dreamreader.specs.call import CallArguments
from dreamreader.specs.maps import MapOptions
from dreamreader.specs.parts import AnySubject, Count, Part

Sites = str | list[str]


class Stitched(Part):
    """How well stitching went at pairs of sites, as another job has measured it."""

    file: str = Field(
        description="With columns source, target, success; or rows.parquet of a stitch experiment."
    )
    effect: str = Field("scene_right", description="Of an experiment, the metric that is success.")
    harmed: float = Field(
        0.5, gt=0, le=1, description="Of an experiment, sites are left out that keep more ablated."
    )


class MapMatrixSpec(parts.Common):
    """Maps from all sites of `subject` to all sites of `target`: prompts, pairing, and the map."""

    kind: Literal["map-matrix"] = Field("map-matrix", description="Of the job.")
    target: AnySubject = Field(description="The model that maps lead to; subject is their source.")
    sites: Sites = Field(min_length=1, description="Of the source: site strings or globs.")
    target_sites: Sites | None = Field(None, description="Of the target; by default those of both.")
    target_pipeline: CallArguments = Field(
        default_factory=dict, description="Arguments of the target's call, beside pipeline."
    )
    align: Literal["index", "place", "spans", "mean"] | None = Field(
        None, description="Which tokens belong together; place of pipelines, spans of texts."
    )
    span: Literal["last", "mean"] = Field("mean", description="What stands for several tokens.")
    skip: int = Field(0, ge=0, description="First pairs of tokens of each text that are left out.")
    schedule: Literal["equal", "noise", "fraction", "source", "target"] = Field(
        "target", description="Which calls of denoisers belong together."
    )
    trajectory: Literal["own", "source", "target"] = Field(
        "target", description="Whose latents denoisers see."
    )
    branch: str = Field("cond", description="Guidance branch.")
    resample: Literal["area", "bilinear"] = Field(
        "area", description="How the source comes to a coarser grid of the target."
    )
    map: Literal["mean", "identity", "procrustes", "ridge", "reduced_rank"] = Field(
        "ridge", description="Closed form that is fitted."
    )
    options: MapOptions = Field(default_factory=dict, description="Of the map, such as rank.")
    chosen: float = Field(
        0.1, gt=0, lt=1, description="Share of prompts that options are chosen by."
    )
    held_out: float = Field(
        0.2, gt=0, lt=1, description="Share of prompts that maps are scored on."
    )
    split_seed: int = Field(0, ge=0, description="Of the draw of these prompts.")
    draws: Count = Field(1000, description="Random maps beside each.")
    sample: Count = Field(1024, description="Held-out rows for retrieval and cosine.")
    unit: Count = Field(
        8, description="Prompts that are recorded at once; a stopped job loses one."
    )
    stitching: Stitched | None = Field(None, description="Success that scores may predict.")

    @model_validator(mode="after")
    def _shares(self) -> "MapMatrixSpec":
        if self.chosen + self.held_out >= 1:
            raise ValueError(
                f"chosen {self.chosen} and held_out {self.held_out} leave no prompts to fit to"
            )
        return self
