"""Which guidance branch each chunk of a batch belongs to."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamreader.engine.families.guidance import Layout, chunks_of
from dreamreader.errors import ClockUnknown


class Branches:
    """Names the branches of the denoiser calls of one pipeline run.

    The name that the pipeline entered through `cache_context` is taken as it is. Without one the
    family's layout decides: a batched call is cut into as many equal chunks as the pipeline
    declares passes at that moment, and the size of the batch has to confirm it; separate calls are
    told apart by their order within a step, and the prompt embeddings have to confirm that.
    """

    def __init__(self, pipe: Any, own: type, layout: Layout | None, arguments: Mapping[str, Any]):
        self.pipe = pipe
        self.family = own.__name__
        self.layout = layout
        self.arguments = arguments
        self.rows = _rows(arguments)
        self._index: int | None = None
        self._calls = 0
        self._embeddings: dict[str, Any] = {}

    def of(
        self, context: str | None, index: int | None, batch: int | None, embedding: Any, skips: bool
    ) -> tuple[str, ...]:
        """Names of the equal chunks of this call's batch, in order.

        Args:
            context: name of the `cache_context` that the call runs in.
            index: entry of the schedule; None when the time is unknown.
            batch: rows of the denoiser's input.
            embedding: its prompt embeddings.
            skips: the call leaves out layers (skip-layer guidance), which is a pass of its own.

        Raises:
            ClockUnknown: nothing says it, or two facts contradict each other.
        """
        if context is not None and context != "cond_uncond":
            return self._checked((context.removeprefix("pred_"),), batch)
        if skips:
            return self._checked(("cond_skip",), batch)
        if self.layout is None:
            raise ClockUnknown(
                f"how {self.family} lays out its guidance passes is not known: it enters no "
                "cache_context and dreamreader/engine/families/guidance.py has no entry for it"
            )
        if self.layout.separate:
            return self._checked((self._in_turn(index, embedding),), batch)
        return self._checked(chunks_of(self.layout, self.pipe, self.arguments), batch)

    def _in_turn(self, index: int | None, embedding: Any) -> str:
        if index is None:
            raise ClockUnknown(
                f"{self.family} calls its denoiser once per branch, and their order cannot be told "
                "without the step"
            )
        if index != self._index:
            self._index, self._calls = index, 0
        turn = self._calls
        self._calls += 1
        order = self.layout.order if self.layout else ()
        if turn >= len(order):
            raise ClockUnknown(
                f"{self.family} called its denoiser {turn + 1} times at one entry of the schedule, "
                f"but has the branches {', '.join(order)}"
            )
        known = next((name for name, seen in self._embeddings.items() if seen is embedding), None)
        if known is None and embedding is not None:
            self._embeddings[order[turn]] = embedding
        elif known is not None and known != order[turn]:
            raise ClockUnknown(
                f"call {turn + 1} of the step should be {order[turn]}, but its prompt embeddings "
                f"are those of {known}: the same tensor for both, or another order than known"
            )
        return order[turn]

    def _checked(self, names: tuple[str, ...], batch: int | None) -> tuple[str, ...]:
        if batch is None:
            return names
        if batch % len(names):
            raise ClockUnknown(
                f"a batch of {batch} rows cannot hold the {len(names)} equal branches "
                f"{', '.join(names)}"
            )
        if self.rows is not None and batch != self.rows * len(names):
            raise ClockUnknown(
                f"the batch has {batch} rows, but {self.rows} pictures in the branches "
                f"{', '.join(names)} make {self.rows * len(names)}"
            )
        return names


def _rows(arguments: Mapping[str, Any]) -> int | None:
    """Pictures that the call asked for; None where its arguments do not say."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, str):
        prompts = 1
    elif isinstance(prompt, list | tuple):
        prompts = len(prompt)
    elif isinstance(embeds, Tensor):
        prompts = embeds.shape[0]
    else:
        return None
    each = arguments.get("num_images_per_prompt", arguments.get("num_videos_per_prompt", 1))
    return prompts * int(1 if each is None else each)
