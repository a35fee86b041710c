"""Which guidance branch each chunk of a batch belongs to."""

from collections.abc import Mapping
from typing import Any

from dreamreader.engine._clock_guider import Passes
from dreamreader.engine._clock_proof import Heard
from dreamreader.engine._clock_rows import rows_of
from dreamreader.engine._families.classes import find_replacement
from dreamreader.engine._families.guidance import BranchLayout, chunks_of
from dreamreader.errors import ClockUnknown


class Branches:
    """Names the branches of the denoiser calls of one pipeline run.

    The name that the pipeline entered through `cache_context` is taken as it is, and so is that of
    the pass which it announced to its guider. Without one the family's layout decides: a batched
    call is cut into as many equal chunks as the pipeline declares passes at that moment, and the
    size of the batch has to confirm it; separate calls are told apart by their order within a step.
    Where no layout is known, a call whose embeddings are all of one prompt is of its branch.
    The prompt embeddings of every call have to agree with any of these.
    """

    def __init__(
        self, pipe: Any, own: type, layout: BranchLayout | None, arguments: Mapping[str, Any]
    ):
        self.pipe = pipe
        self.family = own.__name__
        self.layout = layout
        self.arguments = arguments
        self.rows = rows_of(own, arguments)
        self.heard = Heard(arguments)
        self.passes: Passes | None = None
        self._replaced = find_replacement(own, "__call__")
        self._index: int | None = None
        self._calls = 0
        self._met: set[str] = set()  # the branches of calls that their embeddings alone tell

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
        return self._confirm(
            self._check(self._names(context, index, batch, embedding, skips), batch), embedding
        )

    def _names(
        self, context: str | None, index: int | None, batch: int | None, embedding: Any, skips: bool
    ) -> tuple[str, ...]:
        if context is not None and context != "cond_uncond":
            return (context.removeprefix("pred_"),)
        if skips:
            return ("cond_skip",)
        if self.passes is not None:
            return (self.passes.find_running(embedding).removeprefix("pred_"),)
        if self.layout is None:
            return (self._by_embedding(context, index, batch, embedding),)
        if self.layout.separate:
            return (self._in_turn(index),)
        return self._chunks(batch)

    def beside(self, batch: int | None, embedding: Any) -> tuple[str, ...]:
        """Branches of a call of a ControlNet, which runs ahead of the denoiser's own call.

        Raises:
            ClockUnknown: nothing says them.
        """
        if self.layout is not None and not self.layout.separate:
            names = self._chunks(batch)
            if self.rows is not None and batch == self.rows:
                names = ("cond",)  # guess mode
            return self._confirm(self._check(names, batch), embedding, "beside")
        owners = set() if embedding is None else self.heard.owners(embedding)
        if len(owners) != 1:
            raise ClockUnknown(
                f"{self.family} does not say for which branch it runs its ControlNet, and the call "
                "has no prompt embeddings that encode_prompt returned"
            )
        return self._check(tuple(owners), batch)

    def _by_embedding(
        self, context: str | None, index: int | None, batch: int | None, embedding: Any
    ) -> str:
        """The one branch of a call of an unknown class, whose embeddings are all of one prompt."""
        name = self.heard.branch_of(embedding) if context is None else None
        if name is None or index is None or batch is None or batch != self.rows:
            raise ClockUnknown(self._unknown(context))
        if index != self._index:
            self._index, self._met = index, set()
        if name in self._met:
            raise ClockUnknown(
                f"{self.family} called its denoiser twice with the prompt embeddings of {name} at "
                "one entry of the schedule: which pass that is, is not known"
            )
        self._met.add(name)
        return name

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

    def _confirm(
        self, names: tuple[str, ...], embedding: Any, whose: str = "denoiser"
    ) -> tuple[str, ...]:
        """Compare with what `encode_prompt` returned, and with the first calls of the run."""
        wrong = self.heard.contradiction(names, embedding, whose)
        if wrong is not None:
            turn = f" (call {self._calls} of the step)" if self._calls else ""
            raise ClockUnknown(f"{self.family}{turn}: {wrong}")
        return names

    def _unknown(self, context: str | None) -> str:
        said = "it enters no cache_context" if context is None else f"it only says {context!r}"
        return f"how {self.family} lays out its guidance passes is not known: {said} and " + (
            f"its __call__ was replaced by {self._replaced}"
            if self._replaced
            else "dreamreader/engine/_families/guidance.py has no entry for this class"
        )

    def _in_turn(self, index: int | None) -> str:
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
        return order[turn]

    def _check(self, names: tuple[str, ...], batch: int | None) -> tuple[str, ...]:
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
