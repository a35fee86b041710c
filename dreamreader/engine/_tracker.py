"""Trackers say what is running now: in a pipeline, a language model, a plain module."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, Self

from torch import Tensor, nn

from dreamreader.engine._call_context import ALL, CallContext
from dreamreader.engine._clock import Clock
from dreamreader.engine._clock_rows import prompts_of, rows_of
from dreamreader.engine._clock_run import Parameters, listen_to_pipeline, own_class
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._clock_told import ToldClock
from dreamreader.engine._families.places import (
    StreamLayout,
    layout,
    leaves_padding_out,
    text_lengths,
)
from dreamreader.engine._subject import Subject, innermost, unwrap
from dreamreader.engine._threads import Owner
from dreamreader.errors import ClockUnknown


class Tracker(Protocol):
    """What a session needs to know of a running subject."""

    now: CallContext | None
    runs: int
    rows: int | None
    prompts: list[str] | None

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def outside(self, component: str) -> CallContext: ...
    def total(self) -> int | None: ...
    def schedule(self) -> list[StepInfo]: ...
    def entries(self) -> list[StepInfo]: ...
    def text_ids(self, component: str, branch: str) -> tuple[Tensor, Tensor | None] | None: ...


class PipelineTracker(AbstractContextManager):
    """Follows a diffusers pipeline: its clock says time and branch.

    Attributes:
        now: what is running, of the phase `aside` where a callback of the run called it, or
            anything else that is not the run: nothing of it is edited or recorded.
        rows: pictures or videos that the running or latest call of the pipeline asked for; None
            where its arguments do not say it.
        prompts: the prompt of each of these rows, those of one prompt next to each other.
    """

    def __init__(self, subject: Subject, clock: ToldClock | None = None):
        self.clock = clock or Clock(subject.model)
        self.pipe = subject.model
        self.now: CallContext | None = None
        self.runs = 0
        self.rows: int | None = None
        self.prompts: list[str] | None = None
        self._ids: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}
        self._layouts: dict[tuple, StreamLayout] = {}
        self._outer: list[CallContext | None] = []  # what goes on when the running call is over
        self._stack: ExitStack | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.clock)
            stack.enter_context(listen_to_pipeline(self.pipe, self))
            for name, module in {**self.clock.denoisers, **self.clock.beside}.items():
                self._follow(stack, module, self._denoiser(name, module))
            for name, module in self.clock.text_encoders.items():
                self._follow(stack, module, self._encoder(name, module))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        self.now = None
        self._outer.clear()

    # what the pipeline's listener tells

    def run_began(self, arguments: Mapping[str, Any]) -> None:
        if self.clock.aside() is not None:
            return
        own = own_class(self.pipe)
        self.rows, self.prompts = rows_of(own, arguments), prompts_of(own, arguments)
        self.runs += 1
        self._ids.clear()

    def run_ended(self, failed: bool) -> None:
        if self.clock.aside() is None:
            self.now = None
            self._outer.clear()

    def callback_began(self) -> None:
        pass

    def callback_ended(self) -> None:
        pass

    def encoding_began(self, arguments: Mapping[str, Any]) -> None:
        pass

    def encoding_ended(self, result: Any) -> None:
        pass

    def outside(self, component: str) -> CallContext:
        """What runs where no call of a denoiser or text encoder does."""
        aside = self.clock.aside()
        if aside is not None:
            return self._aside(component, aside, None)
        followed = ", ".join([*self.clock.denoisers, *self.clock.beside]) or "it has none"
        said = f"{component} is being called outside the pipeline's denoisers ({followed})"
        why = ClockUnknown(f"{said}: it has no step")
        return CallContext(
            component, "outside", self.runs, why, ClockUnknown(f"{said}: it has no branch"), None
        )

    def _aside(self, component: str, why: str, batch: int | None) -> CallContext:
        said = ClockUnknown(f"{component} has no step or branch: {why}")
        return CallContext(component, "aside", self.runs, said, said, batch)

    def total(self) -> int | None:
        """Steps of the full trajectory."""
        schedule = self.clock.schedule
        return schedule[-1].step + 1 if schedule else None

    def schedule(self) -> list[StepInfo]:
        return self.clock.schedule

    def entries(self) -> list[StepInfo]:
        """The schedule with every evaluation of its steps."""
        return self.clock.entries

    def text_ids(self, component: str, branch: str) -> tuple[Tensor, Tensor | None] | None:
        return self._ids.get((component, branch))

    def _follow(
        self,
        stack: ExitStack,
        module: nn.Module,
        now_of: Callable[[tuple, dict[str, Any]], CallContext],
    ) -> None:
        def began(args: tuple, kwargs: dict[str, Any]) -> None:
            self._outer.append(self.now)
            self.now = now_of(args, kwargs)

        def ended(output: Any) -> None:
            self.now = self._outer.pop() if self._outer else None

        _watch(stack, module, began, ended)

    def _denoiser(self, name: str, module: nn.Module):
        inner = innermost(module)
        parameters = Parameters(inner)
        by_mask = leaves_padding_out(inner)

        def now_of(args: tuple, kwargs: dict[str, Any]) -> CallContext:
            arguments = parameters.bind(args, kwargs)
            tensors = [each for each in arguments.values() if isinstance(each, Tensor)]
            given = next((each for each in tensors if each.dim() > 1), None)  # no timesteps
            given = next((each for each in tensors if each.dim()), None) if given is None else given
            batch = given.shape[0] if given is not None else None
            aside = self.clock.aside()
            if aside is not None:
                return self._aside(name, aside, batch)
            shapes = tuple(
                (key, value.shape) for key, value in arguments.items() if isinstance(value, Tensor)
            )
            # Masks decide the text lengths of some families, so a mask is part of the key by value.
            key = (name, shapes, text_lengths(arguments) if by_mask else None)
            if key not in self._layouts:
                self._layouts[key] = layout(inner, arguments)
            return CallContext(
                name,
                "denoise",
                self.runs,
                _ask(self.clock.time),
                _ask(self.clock.branches),
                batch,
                self._layouts[key],
            )

        return now_of

    def _encoder(self, name: str, module: nn.Module):
        parameters = Parameters(innermost(module))

        def now_of(args: tuple, kwargs: dict[str, Any]) -> CallContext:
            arguments = parameters.bind(args, kwargs)
            ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
            found = ids if isinstance(ids, Tensor) else None
            batch = found.shape[0] if found is not None else None
            aside = self.clock.aside()
            if aside is not None:
                return self._aside(name, aside, batch)
            branches = _ask(self.clock.branches)
            if found is not None and isinstance(branches, tuple):
                kept = mask if isinstance(mask, Tensor) and mask.shape == found.shape else None
                self._ids[name, branches[0]] = (found, kept)
            why = ClockUnknown(f"{name} runs before the first denoising step: it has no step")
            return CallContext(name, "text", self.runs, why, branches, batch)

        return now_of


class WithoutSchedule(AbstractContextManager):
    """What the trackers of subjects share whose steps no schedule tells ahead."""

    _stack: ExitStack | None = None

    def total(self) -> int | None:
        return None

    def schedule(self) -> list[StepInfo]:
        return []

    def entries(self) -> list[StepInfo]:
        return []

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()


class ModuleTracker(WithoutSchedule):
    """Follows a plain module: each call is a run, without time or branch."""

    def __init__(self, subject: Subject):
        self.module = unwrap(subject.model)
        self.now: CallContext | None = None
        self.runs = 0
        self.rows: int | None = None
        self.prompts: list[str] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            _watch(stack, self.module, self._begin_call, self._end_call)
            self._stack = stack.pop_all()
        return self

    def outside(self, component: str) -> CallContext:
        why = ClockUnknown(f"{type(self.module).__name__} has no denoising steps")
        branch = ClockUnknown(f"{type(self.module).__name__} has no guidance branches")
        return CallContext(component, "outside", self.runs, why, branch, None)

    def text_ids(self, component: str, branch: str) -> tuple[Tensor, Tensor | None] | None:
        return None

    def _begin_call(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.runs += 1
        self.now = self.outside(type(self.module).__name__)

    def _end_call(self, output: Any) -> None:
        self.now = None


def _watch(stack: ExitStack, module: nn.Module, began, ended) -> None:
    """Put hooks around a module's call; they see it after the clock's own, which came first.

    Calls by other threads are not told.
    """
    is_here = Owner().here

    def after(_: nn.Module, args: tuple, output: Any) -> None:
        if is_here():
            ended(output)

    last = module.register_forward_hook(after, always_call=True)

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if is_here():
            began(args, kwargs)
        # The subject's own outputs are a site too: `ended` has to run after every hook on them.
        hooks: Any = module._forward_hooks  # an ordered dictionary, whatever its annotation says
        hooks.move_to_end(last.id)

    first = module.register_forward_pre_hook(before, with_kwargs=True)
    stack.push(last)
    stack.push(first)


def _ask(ask) -> Any:
    try:
        return ask()
    except ClockUnknown as error:
        return error.with_traceback(None)


__all__ = ["ALL", "ModuleTracker", "PipelineTracker", "Tracker"]
