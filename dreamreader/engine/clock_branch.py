"""Which guidance branch each chunk of a batch belongs to."""

from collections.abc import Mapping
from typing import Any

from dreamreader.engine.clock_guider import Passes
from dreamreader.engine.clock_proof import Heard
from dreamreader.engine.clock_rows import rows_of
from dreamreader.engine.families.guidance import Layout, chunks_of
from dreamreader.errors import ClockUnknown


class Branches:
    """Names the branches of the denoiser calls of one pipeline run.

    The name that the pipeline entered through `cache_context` is taken as it is, and so is that of
    the pass which it announced to its guider. Without one the family's layout decides: a batched
    call is cut into as many equal chunks as the pipeline declares passes at that moment, and the
    size of the batch has to confirm it; separate calls are told apart by their order within a step.
    The prompt embeddings have to confirm either.
    """

    def __init__(self, pipe: Any, own: type, layout: Layout | None, arguments: Mapping[str, Any]):
        self.pipe = pipe
        self.family = own.__name__
        self.layout = layout
        self.arguments = arguments
        self.rows = rows_of(own, arguments)
        self.heard = Heard()
        self.passes: Passes | None = None
        self._confirmed = False
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
        if self.passes is not None:
            name = self.passes.running(embedding)
            return self._checked((name.removeprefix("pred_"),), batch)
        if self.layout is None:
            raise ClockUnknown(self._unknown(context))
        if self.layout.separate:
            return self._checked((self._in_turn(index, embedding),), batch)
        return self._confirm(self._checked(self._chunks(batch), batch), embedding)

    def beside(self, batch: int | None, embedding: Any) -> tuple[str, ...]:
        """Branches of a call of a ControlNet, which runs ahead of the denoiser's own call.

        Raises:
            ClockUnknown: nothing says them.
        """
        if self.layout is not None and not self.layout.separate:
            names = self._chunks(batch)
            if self.rows is not None and batch == self.rows:
                names = ("cond",)  # guess mode
            return self._confirm(self._checked(names, batch), embedding)
        owner = None if embedding is None else self.heard.owner(embedding)
        if owner is None:
            raise ClockUnknown(
                f"{self.family} does not say for which branch it runs its ControlNet, and the call "
                "has no prompt embeddings that encode_prompt returned"
            )
        return self._checked((owner,), batch)

    def _chunks(self, batch: int | None) -> tuple[str, ...]:
        """Names of the chunks of a batched call."""
        assert self.layout is not None
        names = chunks_of(self.layout, self.pipe, self.arguments)
        if self.layout.truncates and len(names) > 1:
            if self.rows is None:
                raise ClockUnknown(
                    f"{self.family} may leave guidance out at single steps, and its arguments do "
                    "not say how many pictures it makes, which would tell the two apart"
                )
            if batch == self.rows:
                return ("cond",)
        return names

    def _confirm(self, names: tuple[str, ...], embedding: Any) -> tuple[str, ...]:
        """Compare the first call of the run with what `encode_prompt` returned."""
        if not self._confirmed and len(names) > 1:
            self._confirmed = True
            wrong = self.heard.contradiction(names, embedding)
            if wrong is not None:
                self._confirmed = False
                raise ClockUnknown(f"{self.family}: {wrong}")
        return names

    def _unknown(self, context: str | None) -> str:
        said = "it enters no cache_context" if context is None else f"it only says {context!r}"
        return (
            f"how {self.family} lays out its guidance passes is not known: {said} and "
            "dreamreader/engine/families/guidance.py has no entry for this class"
        )

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
            known = self.heard.owner(embedding)
        if embedding is not None and known in (None, order[turn]):
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
