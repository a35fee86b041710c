"""Exact time and guidance branch of every denoiser call of a diffusers pipeline."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dreamreader.engine.clock_branch import Branches
from dreamreader.engine.clock_run import (
    Parameters,
    listen_to_calls,
    listen_to_context,
    listen_to_pipeline,
    own_class,
    unwrapped,
)
from dreamreader.engine.clock_schedule import Instant, Trajectory
from dreamreader.engine.clock_text import Encoding, encoder_calls
from dreamreader.engine.families.guidance import layout_of
from dreamreader.engine.families.timestep import form_of
from dreamreader.errors import ClockUnknown

_DENOISERS = ("unet", "transformer", "transformer_2")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_SAMPLE = ("sample", "hidden_states", "x")
_TIMESTEP = ("timestep", "timesteps", "t")
_EMBEDDING = ("encoder_hidden_states", "encoder_hidden_states_t5", "cap_feats")


@dataclass(frozen=True)
class Moment(Instant):
    """One call of the denoiser: its time, and what its batch holds.

    Attributes:
        branches: names of the equal chunks of the batch, in order: ("uncond", "cond") for a call
            that runs both, ("cond",) for one pass. Other names come from the pipeline: "cond_skip"
            (skip-layer guidance), "perturbed" (perturbed-attention guidance), "image"
            (InstructPix2Pix).
    """

    branches: tuple[str, ...]


class _Call:
    """The running call of a denoiser: time and branches, or why they are unknown."""

    __slots__ = ("branches", "instant", "moment", "name")

    def __init__(self, name: str):
        self.name = name
        self.instant: Instant | ClockUnknown
        self.branches: tuple[str, ...] | ClockUnknown
        self.moment: Moment | None = None


class Clock:
    """Follows a diffusers pipeline and says when and in which branch its denoiser is being called.

    The step follows from the scheduler's place in its own `timesteps` (step index, begin index or
    counter), confirmed by the timestep that the denoiser receives; see `Instant` for every
    definition. The branch is the name of the pipeline's `cache_context`, else follows from the
    family's guidance layout, confirmed by the size of the batch. Nothing is counted and nothing is
    guessed: what cannot be known raises.

    The clock follows every run of the pipeline inside its `with` block. It adds hooks of its own to
    the denoisers and text encoders, hears `cache_context`, and sees the pipeline being called; all
    of it is gone after the block, also after an exception. Values are never changed. A CUDA device
    is waited for once at the start of a run, and once at its end if timesteps were checked that
    live there.

    Args:
        pipe: a diffusers pipeline with a scheduler.

    Attributes:
        denoisers: the pipeline's denoisers by component name.
        text_encoders: its text encoders by component name.

    Example:
        >>> with Clock(pipe) as clock:                                  # doctest: +SKIP
        ...     pipe.unet.mid_block.register_forward_hook(lambda *_: print(clock.now()))
        ...     pipe("a red circle", num_inference_steps=20)
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.denoisers = _modules(pipe, _DENOISERS)
        self.text_encoders = _modules(pipe, _TEXT_ENCODERS)
        self._stack: ExitStack | None = None
        self._parameters = {name: Parameters(module) for name, module in self.denoisers.items()}
        self._contexts: dict[str, list[str]] = {name: [] for name in self.denoisers}
        self._runs: list[_Run] = []
        self._last: Trajectory | None = None
        self._call: _Call | None = None
        self._encoding: Encoding | None = None
        self._encoder: tuple[str, tuple[str, ...] | ClockUnknown] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(listen_to_pipeline(self.pipe, self))
            for name, module in self.denoisers.items():
                stack.enter_context(listen_to_context(module, self._contexts[name]))
                stack.enter_context(listen_to_calls(module, self._hear(name), self._called))
            for name, module in self.text_encoders.items():
                stack.enter_context(listen_to_calls(module, self._hear_text(name), self._encoded))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        self._runs.clear()
        self._call = self._encoding = self._encoder = None

    def now(self) -> Moment:
        """Time and branches of the denoiser call that is running.

        Raises:
            ClockUnknown: no denoiser of this pipeline is running, or its time or branch cannot be
                known.
        """
        call = self._call
        if call is not None and call.moment is not None:
            return call.moment
        instant, branches = self.time(), self.branches()
        moment = Moment(**vars(instant), branches=branches)
        if call is not None:
            call.moment = moment
        return moment

    def time(self) -> Instant:
        """Time of the denoiser call that is running; known also where the branch is not.

        Raises:
            ClockUnknown: no denoiser of this pipeline is running, or its time cannot be known.
        """
        if self._call is None:
            raise ClockUnknown(self._idle("step"))
        return _known(self._call.instant)

    def branches(self) -> tuple[str, ...]:
        """Names of the equal chunks of the batch of the running denoiser or text encoder.

        Raises:
            ClockUnknown: neither is running, or the branch cannot be known.
        """
        if self._call is not None:
            return _known(self._call.branches)
        if self._encoder is not None:
            return _known(self._encoder[1])
        raise ClockUnknown(self._idle("branch"))

    @property
    def schedule(self) -> list[Instant]:
        """The steps of the running or latest run, from its first one to the end of the schedule.

        Empty until a denoiser has been called.
        """
        trajectory = self._trajectory
        return [] if trajectory is None else trajectory.steps()

    @property
    def entries(self) -> list[Instant]:
        """Like `schedule`, with every evaluation of the steps of second-order solvers."""
        trajectory = self._trajectory
        return [] if trajectory is None else trajectory.entries()

    @property
    def _trajectory(self) -> Trajectory | None:
        return self._runs[-1].trajectory if self._runs else self._last

    # what the listeners tell

    def run_began(self, arguments: Mapping[str, Any]) -> None:
        """A call of the pipeline begins: nothing of an earlier one is believed any more."""
        self._runs.append(_Run(self.pipe, arguments))
        self._call = self._encoding = self._encoder = None
        for names in self._contexts.values():
            names.clear()

    def run_ended(self, failed: bool) -> None:
        """The call is over; timesteps that could not be read without waiting are compared now."""
        self._call = None
        run = self._runs.pop() if self._runs else None  # the clock may have been closed meanwhile
        if run is not None and run.trajectory is not None:
            self._last = run.trajectory
            if not failed:
                run.trajectory.settle()

    def encoding_began(self, arguments: Mapping[str, Any]) -> None:
        """`encode_prompt` begins."""
        run = self._runs[-1].arguments if self._runs else None
        self._encoding = Encoding(encoder_calls(own_class(self.pipe), arguments, run))

    def encoding_ended(self) -> None:
        """`encode_prompt` is over."""
        self._encoding = None

    def _hear(self, name: str):
        parameters = self._parameters[name]
        sample_name = parameters.first_of(_SAMPLE)
        timestep_name = parameters.first_of(_TIMESTEP)
        embedding_name = parameters.first_of(_EMBEDDING)
        skips_name = parameters.first_of(("skip_layers",))
        names = self._contexts[name]
        module = self.denoisers[name]

        def began(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._call = call = _Call(name)
            if not self._runs:
                call.instant = call.branches = ClockUnknown(
                    f"{name} was called outside a run of the pipeline, so no schedule holds for it"
                )
                return
            run = self._runs[-1]
            sample = parameters.get(sample_name, args, kwargs)
            timestep = parameters.get(timestep_name, args, kwargs)
            index: int | None = None
            try:
                trajectory = run.trajectory_of(module)
                index = trajectory.locate(timestep, _precision(timestep, sample))
                call.instant = trajectory.instant(index)
            except ClockUnknown as error:
                call.instant = error
            try:
                call.branches = run.branches.of(
                    names[-1] if names else None,
                    index,
                    len(sample) if isinstance(sample, Tensor | list) else None,
                    parameters.get(embedding_name, args, kwargs),
                    parameters.get(skips_name, args, kwargs) is not None,
                )
            except ClockUnknown as error:
                call.branches = error

        return began

    def _called(self) -> None:
        self._call = None

    def _hear_text(self, name: str):
        def began(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._encoding is None:
                reason = (
                    f"{name} was called outside encode_prompt, so whose prompt it reads is unknown"
                )
                self._encoder = (name, ClockUnknown(reason))
            else:
                self._encoder = (name, self._encoding.next_of(name))

        return began

    def _encoded(self) -> None:
        self._encoder = None

    def _idle(self, what: str) -> str:
        if self._stack is None:
            return "the clock follows the pipeline only inside its with block"
        if self._encoder is not None:
            return f"{self._encoder[0]} runs before the first denoising step: it has no {what}"
        known = ", ".join(self.denoisers) or "it has none"
        return f"no denoiser of the pipeline ({known}) is running: no {what}"


class _Run:
    """What is known about one call of the pipeline."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]):
        self.pipe = pipe
        self.arguments = arguments
        own = own_class(pipe)
        self.branches = Branches(pipe, own, layout_of(own), arguments)
        self.trajectory: Trajectory | None = None

    def trajectory_of(self, denoiser: nn.Module) -> Trajectory:
        """The schedule that the pipeline has set; read anew when it sets another."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None or getattr(scheduler, "timesteps", None) is None:
            raise ClockUnknown(f"{self.branches.family} has no scheduler with timesteps")
        trajectory = self.trajectory
        if (
            trajectory is None
            or trajectory.source is not scheduler.timesteps
            or trajectory.scheduler is not scheduler
        ):
            inner = unwrapped(denoiser)
            form = form_of(type(inner))
            trajectory = Trajectory(scheduler, form, getattr(inner, "config", None))
            self.trajectory = trajectory
        return trajectory


def _modules(pipe: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _known(value: Any) -> Any:
    if isinstance(value, ClockUnknown):
        raise ClockUnknown(*value.args)
    return value


def _precision(timestep: Any, sample: Any) -> float:
    """Relative rounding error that a timestep may carry: pipelines cast it to the latents' type."""
    widest = 1e-6
    for value in (timestep, sample):
        if isinstance(value, Tensor) and value.is_floating_point():
            widest = max(widest, 4 * torch.finfo(value.dtype).eps)
        elif value is timestep:
            return widest  # whole numbers are not rounded
    return widest
