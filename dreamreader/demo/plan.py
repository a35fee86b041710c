"""What the demo is free to choose; everything else is in the spec files beside this module."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.jobs.kinds import job_type
from dreamreader.specs.load import check_spec, read_content
from dreamreader.specs.overrides import apply_override
from dreamreader.zoo import scenes

SPECS = Path(__file__).parent / "specs"
_SEEDS = 100_000  # between the noise of one seed of the demo and the next

Changes = Mapping[str, Sequence[str]]

_SMALL: Changes = {
    "all": ["pipeline.num_inference_steps=8"],
    "record": ["data.scenes.count=2", "seeds.count=1"],
    "sweep": ["method.windows=[[0,8],[0,4],[4,8]]", "method.strengths=[2,4]", "data.limit=2"],
    "refine": ["data.limit=2"],
    "test": ["data.limit=2"],
    "dose": ["data.limit=2"],
    "remove": ["data.limit=2"],
    "patch": ["method.windows=[[0,4],[4,8],[0,8]]", "data.limit=1"],
}


@dataclass(frozen=True)
class DemoPlan:
    """Colours, seed and subject of the demo, and changes to its specs.

    Attributes:
        source, target: the colour that prompts name, and the one to steer to.
        seed: draws scenes and noise.
        subject: of the specs; the reader that runs is given apart.
        changes: overrides of spec files by their name, such as `{"test": ["data.limit=4"]}`; those
            of `all` are of every spec.
        finalists: settings of the sweep that are drawn on more scenes before the choice.
        keep: share of kept shapes and places below which the page sets a cell in brackets.
    """

    source: str = "red"
    target: str = "blue"
    seed: int = 0
    subject: str | Mapping[str, str] = "shapes-unet"
    changes: Changes = field(default_factory=dict)
    finalists: int = 5
    keep: float = 0.8

    def __post_init__(self):
        for color in (self.source, self.target):
            if color not in scenes.COLORS:
                raise UnknownName("colour", color, scenes.COLORS)
        if self.source == self.target:
            raise InvalidInput(f"source and target colour are both {self.source}")

    def small(self) -> "DemoPlan":
        """A few pictures of everything: to see that it works, not to believe its numbers."""
        return replace(self, changes=_SMALL, finalists=2)

    def spec(self, name: str, chosen: Mapping[str, Any] | None = None) -> Any:
        """The spec of one job.

        Args:
            name: of its file.
            chosen: fields of its method by dotted key, as the earlier jobs have chosen them.
        """
        file = SPECS / f"{name}.yaml"
        content, _ = read_content(file)
        model = job_type(content.get("kind", "experiment")).model
        colors = {"source": {"color": self.source}, "target": {"color": self.target}}
        content["subject"] = self.subject
        content["data"]["scenes"] |= {"seed": self.seed, **colors}
        content["seeds"]["start"] += _SEEDS * self.seed
        for change in (*self.changes.get("all", ()), *self.changes.get(name, ())):
            apply_override(model, content, change)
        for key, value in (chosen or {}).items():
            apply_override(model, content, f"method.{key}={json.dumps(value)}")
        return check_spec(model, content, source=str(file))
