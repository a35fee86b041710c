"""What an experiment is, as data; `ExperimentSpec` adds the method."""

from typing import Any

from pydantic import Field, field_validator

from dreamreader.specs import parts

Metric = str | dict[str, dict[str, Any] | None]


class Save(parts.Part):
    """What is kept of every row beside its numbers."""

    images: bool = Field(default=True, description="Pictures as PNG files in artifacts/images/.")


class ExperimentFields(parts.Common):
    """Fields of every spec of an experiment; `ExperimentSpec` adds the method."""

    metrics: list[Metric] = Field(default_factory=list)
    save: Save = Field(default_factory=Save)

    @field_validator("metrics")
    @classmethod
    def _one_each(cls, value: list[Metric]) -> list[Metric]:
        for each in value:
            if isinstance(each, dict) and len(each) != 1:
                raise ValueError(f"a metric is a name, or one name with options, got {each}")
        return value
