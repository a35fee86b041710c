"""The subject on the bench: one way to run it, which counts pictures and keeps firing reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.demo.plan import DemoPlan

if TYPE_CHECKING:
    from dreamreader.engine import Reader, RunResult


@dataclass
class Bench:
    """A reader with the settings of a plan.

    Attributes:
        advance: called with the share of a picture that a denoising step finished, times the rows.
        fired: title and firing report of every run with edits, in order.
        pictures: how many have been drawn.
    """

    reader: "Reader"
    plan: DemoPlan
    advance: Callable[[float], Any] = lambda amount: None
    fired: list[tuple[str, Any]] = field(default_factory=list)
    pictures: int = 0

    def run(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        edits: Sequence[Any] = (),
        record: Sequence[Any] = (),
        title: str = "",
    ) -> "RunResult":
        """Runs rows in batches of the plan's size; a per-row strength has one value per row."""
        sizes = [
            min(self.plan.batch, len(prompts) - i) for i in range(0, len(prompts), self.plan.batch)
        ]
        running = iter(sizes)

        def tick(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                tick.rows = next(running, sizes[-1])  # pyright: ignore[reportFunctionMemberAccess]
            self.advance(tick.rows / self.plan.steps)  # pyright: ignore[reportFunctionMemberAccess]
            return values

        result = self.reader.run(
            list(prompts),
            edits=list(edits),
            record=list(record),
            seeds=list(seeds),
            batch_size=self.plan.batch,
            num_inference_steps=self.plan.steps,
            guidance_scale=self.plan.guidance,
            output_type="pt",
            callback_on_step_end=tick,
        )
        self.pictures += len(prompts)
        if title:
            self.fired.append((title, result.firing))
        return result

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        edits: Sequence[Any] = (),
        title: str = "",
    ) -> Float[Tensor, "n 3 h w"]:
        """Pictures of the rows, values in [0, 1]."""
        return as_tensor(self.run(prompts, seeds, edits, title=title).images)


def as_tensor(images: Any) -> Float[Tensor, "n 3 h w"]:
    """The pictures of a run as one tensor."""
    return images if isinstance(images, Tensor) else torch.stack(list(images))
