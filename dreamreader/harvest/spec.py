"""What a harvest is, as data."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from dreamreader.engine import Box
from dreamreader.specs import parts
from dreamreader.specs.call import CallArguments
from dreamreader.specs.parts import AnySubject, Count, Part, Seed

Pair = tuple[float, float]


class TokenChoice(Part):
    """Which tokens, where it is neither indices nor a word."""

    every: Count | None = Field(None, description="Every n-th.")
    random: Count | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Random ones, others at each call: a share, or how many."
    )
    budget: Count | None = Field(
        None, description="Random ones: so many rows of a sample and branch over all its steps."
    )
    box: tuple[float, float, float, float] | None = Field(
        None, description="Of the picture: left, top, right, bottom, in shares."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "TokenChoice":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of every, random, budget and box, got {given or 'none'}")
        return self

    @property
    def selection(self) -> slice | Box | None:
        """What a `Stream` takes; random tokens are drawn after it."""
        if self.every is not None:
            return slice(None, None, self.every)
        return None if self.box is None else Box(*self.box)


class Capture(Part):
    """Sites, and which of their rows are stored in which way."""

    sites: str | list[str] = Field(description="Site strings or globs.")
    steps: int | tuple[int, int] | None = Field(None, description="A step, or [start, stop].")
    timesteps: float | Pair | None = Field(None, description="A timestep, or [low, high].")
    sigmas: float | Pair | None = Field(None, description="A noise level, or [low, high].")
    fraction: Pair | None = Field(None, description="Share of the trajectory, [low, high].")
    branch: str | list[str] | None = Field(None, description="Guidance branch; all by default.")
    tokens: int | str | list[int] | TokenChoice = Field(
        "all",
        description="all, indices, a word of the prompt, box: [left, top, right, bottom], "
        "every: n, random: share or count, budget: rows of a sample.",
    )
    dtype: Literal["model", "float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] = Field(
        "bfloat16", description="Of the stored values; model: as the model has them."
    )
    pool: Literal["none", "mean", "max"] = Field("none", description="Over the tokens kept.")

    @field_validator("steps")
    @classmethod
    def _some_steps(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if isinstance(value, tuple) and not 0 <= value[0] < value[1]:
            raise ValueError(f"needs 0 <= start < stop, got {list(value)}")
        return value

    @field_validator("sites")
    @classmethod
    def _some_sites(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("is empty")
        return value

    @property
    def patterns(self) -> list[str]:
        return [self.sites] if isinstance(self.sites, str) else self.sites

    @property
    def selection(self) -> dict[str, object]:
        """Arguments of a `Stream`."""
        tokens = self.tokens.selection if isinstance(self.tokens, TokenChoice) else self.tokens
        return {
            "steps": range(*self.steps) if isinstance(self.steps, tuple) else self.steps,
            "timesteps": self.timesteps,
            "sigmas": self.sigmas,
            "fraction": self.fraction,
            "branch": self.branch,
            "tokens": None if tokens == "all" else tokens,
        }

    def stored(self, source: torch.dtype) -> torch.dtype:
        """The dtype on disk of values that the model has in `source`."""
        return source if self.dtype == "model" else getattr(torch, self.dtype)


class Target(Part):
    """A second subject, whose rows belong to those of the first: a store of its own in `target/`.

    Names are those of `dreamreader.recording.record_between`.
    """

    subject: AnySubject
    capture: list[Capture] | None = Field(
        None, min_length=1, description="Of this subject; those of the first by default."
    )
    pipeline: CallArguments = Field(
        default_factory=dict, description="Arguments of its call beside `pipeline`."
    )
    schedule: Literal["equal", "noise", "fraction", "source", "target"] = Field(
        "equal", description="Which calls of two denoisers belong together."
    )
    trajectory: Literal["own", "source", "target"] = Field(
        "own", description="Latents that denoisers see: their own, or those of one for both."
    )
    branch: str = Field("cond", description="Guidance branch of both denoisers.")


class StoreOptions(Part):
    """How the store is written."""

    unit: Count | Literal["auto"] = Field(
        default="auto",
        description="Samples of a unit, which a stopped job loses at most; auto: shard_mb.",
    )
    shard_mb: float = Field(default=256, gt=0, description="MiB of a unit, all sites together.")
    pressure: Literal["block", "sample"] = Field(
        default="block",
        description="Where the disk is too slow: the model waits, or rows are left out.",
    )
    not_finite: Literal["refuse", "keep"] = Field(
        default="refuse", description="Rows with NaN or infinity: an error, or kept and counted."
    )
    ring_mb: float = Field(
        default=256, gt=0, description="MiB of memory for rows on their way to disk."
    )


class Spec(parts.Common):
    """A whole harvest: subject, data, what is captured, how it is stored."""

    kind: Literal["harvest"] = Field("harvest", description="Of the job.")
    capture: list[Capture] = Field(min_length=1)
    target: Target | None = Field(None, description="A second subject, recorded in lock-step.")
    store: StoreOptions = Field(default_factory=StoreOptions)
    token_seed: Seed = Field(0, description="Of the choice of random tokens.")
    max_tokens: Count | None = Field(
        None, description="Longer texts are cut; the model's context by default."
    )

    @model_validator(mode="after")
    def _no_pairs(self) -> "Spec":
        if self.data.pairs:
            raise ValueError("data.pairs: a harvest runs prompts; give prompts, a file or scenes")
        return self

    def of_target(self) -> "Spec":
        """That of a harvest of the target alone."""
        own = self.target
        assert own is not None
        capture = self.capture if own.capture is None else own.capture
        changes = {"subject": own.subject, "capture": capture, "target": None}
        pipeline = {**self.pipeline, **own.pipeline}
        return self.model_copy(update={**changes, "pipeline": pipeline})
