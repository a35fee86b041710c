"""Which guidance branch each chunk of a batch belongs to."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dreamreader.engine.families.guidance import Layout, chunks_of, encodes_prompt_first
from dreamreader.errors import ClockUnknown


class Branches:
    """Names the branches of the denoiser calls of one pipeline run.

    The name that the pipeline entered through `cache_context` is taken as it is. Without one the
    family's layout decides: a batched call is cut into as many equal chunks as the pipeline declares
    passes at that moment, and the size of the batch has to confirm it; separate calls are told apart
    by their order within a step, and the prompt embeddings have to confirm that.
    """

    def __init__(self, pipe: Any, own: type, layout: Layout | None, arguments: Mapping[str, Any]):
        self.pipe = pipe
        self.family = own.__name__
        self.layout = layout
        self.arguments = arguments
        self.rows = _rows(arguments)
        self._index: int | None = None
        self._calls = 0
        self._embeddings: list[tuple[Any, str]] = []

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
                f"{self.family} calls its denoiser once per branch, and without the step their order is unknown"
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
        known = next((name for seen, name in self._embeddings if seen is embedding), None)
        if known is None and embedding is not None:
            self._embeddings.append((embedding, order[turn]))
        elif known is not None and known != order[turn]:
            raise ClockUnknown(
                f"call {turn + 1} of the step should be {order[turn]}, but its prompt embeddings are "
                f"those of {known}: the same tensor was given for both, or the order has changed"
            )
        return order[turn]

    def _checked(self, names: tuple[str, ...], batch: int | None) -> tuple[str, ...]:
        if batch is None:
            return names
        if batch % len(names):
            raise ClockUnknown(
                f"a batch of {batch} rows cannot hold the {len(names)} equal branches {', '.join(names)}"
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


def encoder_calls(
    own: type, arguments: Mapping[str, Any], run: Mapping[str, Any] | None
) -> tuple[str, ...] | None:
    """Branches that one `encode_prompt` runs each of its text encoders for, in order.

    None when that is not known. Families that encode both prompts in one go do the prompt first, and
    skip each whose embeddings are given. Pipelines that call it once per branch are
    told apart by which of the run's two prompts they hand over.
    """
    if "do_classifier_free_guidance" in arguments:
        if not encodes_prompt_first(own):
            return None
        names = ("cond",) if arguments.get("prompt_embeds") is None else ()
        negative = arguments.get("negative_prompt_embeds") is None
        if arguments["do_classifier_free_guidance"] and negative:
            names = (*names, "uncond")
        return names
    if run is None or arguments.get("prompt") is None:
        return None
    given = arguments["prompt"]
    positive = given is run.get("prompt") or given == run.get("prompt")
    negative = given is run.get("negative_prompt") or given == run.get("negative_prompt")
    if positive == negative:
        return None
    return ("cond",) if positive else ("uncond",)
