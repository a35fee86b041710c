"""Parts that all spec files have in common: subject, data, seeds, batches."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _once(values: list[int]) -> list[int]:
    seen: set[int] = set()
    for each in values:
        if each in seen:
            raise ValueError(f"seed {each} is there twice")
        seen.add(each)
    return values


SeedList = Annotated[list[Seed], Field(min_length=1), AfterValidator(_once)]


class Part(BaseModel):
    """Base of every part of a spec: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Subject(Part):
    """The model under study."""

    model: str = Field(
        description="Embedded or fetched model, folder of diffusers or transformers, or hub id."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field("cpu", description="Device of torch, such as cpu or cuda:0.")


class Scenes(Part):
    """Captions of the embedded world, with one object each; pairs where `target` is given."""

    count: Count
    seed: int = 0
    source: dict[str, str] = Field(
        default_factory=dict, description="Attributes that every caption has, e.g. color: red."
    )
    target: dict[str, str] | None = Field(
        None, description="Attributes that the other prompt of a pair has instead."
    )
    unsaid: list[Literal["color", "size", "place", "background"]] = Field(
        default_factory=list, description="Attributes that the captions leave out."
    )


class Data(Part):
    """Prompts, or pairs of prompts: exactly one of `prompts`, `pairs`, `file` and `scenes`.

    A pair has a `source` prompt, which is run and edited, and a `target` prompt: what steering
    moves to, and where patched activations come from. Further columns go into the rows as they are.
    """

    prompts: list[str | dict[str, Any]] | None = Field(
        None, description="Prompts, or mappings with prompt and further columns such as id."
    )
    pairs: list[dict[str, Any]] | None = Field(
        None, description="Mappings with source, target and further columns."
    )
    file: str | None = Field(
        None, description="TXT (a prompt a line), CSV, JSONL or Parquet with these columns."
    )
    scenes: Scenes | None = None
    limit: Count | None = Field(None, description="Only the first so many.")

    @model_validator(mode="after")
    def _one_kind(self) -> "Data":
        given = [name for name in ("prompts", "pairs", "file", "scenes") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of prompts, pairs, file and scenes, got {given or 'none'}"
            )
        return self


class Seeds(Part):
    """`count` seeds from `start` on."""

    start: Seed = 0
    count: Count = 1

    @property
    def listed(self) -> range:
        return range(self.start, self.start + self.count)


def _counted(value: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    return {"count": value} if number else value


AnySeeds = Annotated[
    SeedList | Seeds, BeforeValidator(_counted, json_schema_input_type=Count | SeedList | Seeds)
]


class Batch(Part):
    """How rows share a call of the subject."""

    rows: Count | Literal["auto"] = Field(
        default="auto", description="Rows in one call; auto: what fits the memory, 48 at most."
    )
    memory: float | None = Field(
        default=None,
        gt=0,
        description="GiB that activations may take; half of the free memory by default.",
    )


class Common(Part):
    """Fields of every spec."""

    name: str = Field(min_length=1, max_length=80, description="Title; also names the folder.")
    subject: Subject
    data: Data
    seeds: AnySeeds = Field(
        default_factory=Seeds, description="Every prompt is run with every seed."
    )
    pipeline: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the pipeline's call, or of a language model's generate.",
    )
    batch: Batch = Field(default_factory=Batch)

    @field_validator("subject", mode="before", json_schema_input_type=str | Subject)
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @property
    def seed_list(self) -> Sequence[int]:
        return listed_seeds(self.seeds)


def listed_seeds(seeds: list[int] | Seeds) -> Sequence[int]:
    """The seeds one by one."""
    return seeds.listed if isinstance(seeds, Seeds) else list(seeds)
