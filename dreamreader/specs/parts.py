"""Parts that all spec files have in common: subject, data, seeds, batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dreamreader.specs.call import CallArguments

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _refuse_repeats(values: list[int]) -> list[int]:
    seen: set[int] = set()
    for each in values:
        if each in seen:
            raise ValueError(f"seed {each} is there twice")
        seen.add(each)
    return values


SeedList = Annotated[list[Seed], Field(min_length=1), AfterValidator(_refuse_repeats)]


def _has_truth(value: Any) -> bool:
    listed = isinstance(value, list | tuple)
    return isinstance(value, bool) or (listed and any(_has_truth(each) for each in value))


def _takes_truth(annotation: Any) -> bool:
    """Whether a type has truth values, itself or in its parts."""
    if annotation in (bool, Any, object):
        return True
    if get_origin(annotation) is Literal:
        return any(isinstance(each, bool) for each in get_args(annotation))
    inner = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
    return any(_takes_truth(each) for each in inner)


class Part(BaseModel):
    """Base of every part of a spec: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values(cls, content: Any) -> Any:
        """Refuses yes and no where a number or text is asked: they would count as 1 and 0."""
        for name, value in content.items() if isinstance(content, dict) else ():
            field = cls.model_fields.get(name)
            if field is not None and _has_truth(value) and not _takes_truth(field.annotation):
                raise PydanticCustomError(
                    "truth_value",
                    "{name}: no truth value is taken here (YAML reads yes, no, on, off, true and "
                    "false as such); write a number, or the word in quotes",
                    {"name": name},
                )
        return content


@dataclass(frozen=True)
class Shorthand:
    """A plain value that stands for a mapping: `value` for `{key: value}`.

    It stands in the annotation of the field, where overrides find it.
    """

    key: str
    kind: type = str

    def expand(self, value: Any) -> Any:
        plain = isinstance(value, self.kind) and not isinstance(value, bool)
        return {self.key: value} if plain else value


class Subject(Part):
    """The model under study."""

    model: str = Field(
        description="Embedded or fetched model, folder of diffusers or transformers, or hub id."
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = Field(
        "float32", description="Of the weights; auto: the one in which they are stored."
    )
    device: str = Field("cpu", description="Device of torch, such as cpu or cuda:0.")
    adapter: str | None = Field(
        None, description="Folder of PEFT, or LoRA weights of a pipeline, merged into the weights."
    )


_MODEL = Shorthand("model")
AnySubject = Annotated[
    Subject, BeforeValidator(_MODEL.expand, json_schema_input_type=str | Subject), _MODEL
]


class Scenes(Part):
    """Captions of the embedded world, with one object each; pairs where `target` is given."""

    count: Count
    seed: int = 0
    skip: int = Field(
        0, ge=0, description="Leave out the first so many: sets of one seed that share no scene."
    )
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

    prompts: list[Annotated[str | dict[str, Any], Shorthand("prompt")]] | None = Field(
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


def _read_seeds(value: Any) -> Any:
    """Refuses what is no seeds at all in words of its own."""
    listed = value if isinstance(value, list | tuple | range) else ()
    wrong = [each for each in listed if type(each) is not int]
    if wrong or not isinstance(value, list | tuple | range | Mapping | Seeds | int):
        raise PydanticCustomError(
            "seeds",
            "seeds are whole numbers from 0 on without quotes, [0, 1], or {count}",
            {"count": "{start: 0, count: 2}"},
        )
    if isinstance(value, Mapping):
        texts = [name for name in ("start", "count") if isinstance(value.get(name), str)]
        if texts:
            raise PydanticCustomError(
                "seeds",
                "{name} is a whole number without quotes, as in {count}",
                {"name": texts[0], "count": "{start: 0, count: 2}"},
            )
    if isinstance(value, int) and not isinstance(value, bool):
        raise PydanticCustomError(
            "seeds",
            "{value} could be one seed or a number of seeds: write [{value}] for the seed {value}, "
            "{count} for the seeds from 0 on",
            {"value": value, "count": f"{{count: {value}}}"},
        )
    return value


AnySeeds = Annotated[
    SeedList | Seeds, BeforeValidator(_read_seeds, json_schema_input_type=SeedList | Seeds)
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
    subject: AnySubject
    data: Data
    seeds: AnySeeds = Field(
        default_factory=Seeds, description="Every prompt is run with every seed."
    )
    pipeline: CallArguments = Field(
        default_factory=dict,
        description="Arguments of the pipeline's call, or of a language model's generate.",
    )
    batch: Batch = Field(default_factory=Batch)

    @property
    def seed_list(self) -> Sequence[int]:
        return listed_seeds(self.seeds)


def listed_seeds(seeds: list[int] | Seeds) -> Sequence[int]:
    """The seeds one by one."""
    return seeds.listed if isinstance(seeds, Seeds) else list(seeds)
