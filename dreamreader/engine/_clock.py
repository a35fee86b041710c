"""Exact time and guidance branch of every denoiser call of a diffusers pipeline."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dreamreader.engine._clock_branch import Branches
from dreamreader.engine._clock_guider import listen_to_guider
from dreamreader.engine._clock_run import (
    Parameters,
    listen_to_calls,
    listen_to_context,
    listen_to_pipeline,
    other_caller,
    own_class,
)
from dreamreader.engine._clock_schedule import StepInfo, Trajectory
from dreamreader.engine._clock_text import Encoding, embedded_branches, encoder_calls
from dreamreader.engine._families.guidance import layout_of
from dreamreader.engine._families.timestep import form_of, has_clean_tokens
from dreamreader.engine._subject import innermost
from dreamreader.errors import ClockUnknown

_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")
_BESIDE = ("controlnet",)  # run in the loop, ahead of the denoiser's call
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_SAMPLE = ("sample", "hidden_states", "x")
_TIMESTEP = ("timestep", "timesteps", "timestep_ratio", "t", "r")
_EMBEDDING = ("encoder_hidden_states", "encoder_hidden_states_t5", "cap_feats", "clip_text", "c")


@dataclass(frozen=True)
class DenoiserCall(StepInfo):
    """One call of the denoiser: its time, and what its batch holds.

    Attributes:
        branches: names of the equal chunks of the batch, in order: ("uncond", "cond") for a call
            that runs both, ("cond",) for one pass. Other names come from the pipeline: "cond_skip"
            (skip-layer guidance), "perturbed" (perturbed-attention guidance), "image"
            (InstructPix2Pix).
    """

    branches: tuple[str, ...]


class _RunningCall:
    """The running call of a denoiser: time and branches, or why they are unknown."""

    __slots__ = ("aside", "branches", "instant", "moment", "name", "outer")

    def __init__(self, name: str, outer: "_RunningCall | None", aside: str | None):
        self.name = name
        self.outer = outer  # within which it runs
        self.aside = aside  # why it is not the run's own
        self.instant: StepInfo | ClockUnknown
        self.branches: tuple[str, ...] | ClockUnknown
        self.moment: DenoiserCall | None = None


class Clock:
    """Follows a diffusers pipeline and says when and in which branch its denoiser is being called.

    The step follows from the scheduler's place in its own `timesteps` (step index, begin index or
    counter), confirmed by the timestep that the denoiser receives; see `StepInfo` for every
    definition. The branch is the name of the pipeline's `cache_context`, else follows from the
    family's guidance layout, confirmed by the size of the batch. Nothing is counted and nothing is
    guessed: what cannot be known raises.

    A ControlNet has the step of the denoiser call that follows, and the branches that it runs for.
    What a callback of the run calls is not the run: another pipeline that shares the denoiser, or
    the denoiser itself, has neither time nor branch. Nor has another pipeline that runs meanwhile
    in a hook or in the scheduler, a run of the pipeline within its run, or a denoiser's call within
    another one.

    The clock follows every run of the pipeline inside its `with` block. It adds hooks of its own to
    the denoisers and text encoders, hears `cache_context`, and sees the pipeline being called; all
    of it is gone after the block, also after an exception. Values are never changed. A CUDA device
    is waited for once at the start of a run, and once at its end if timesteps were checked that
    live there.

    Args:
        pipe: a diffusers pipeline with a scheduler.

    Attributes:
        denoisers: the pipeline's denoisers by component name.
        beside: its ControlNets by component name.
        text_encoders: its text encoders by component name.

    Example:
        >>> with Clock(pipe) as clock:                                  # doctest: +SKIP
        ...     pipe.unet.mid_block.register_forward_hook(lambda *_: print(clock.now()))
        ...     pipe("a red circle", num_inference_steps=20)
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.denoisers = _modules(pipe, _DENOISERS)
        self.beside = _modules(pipe, _BESIDE)
        self.text_encoders = _modules(pipe, _TEXT_ENCODERS)
        self._stack: ExitStack | None = None
        followed = {**self.denoisers, **self.beside}
        self._parameters = {name: Parameters(module) for name, module in followed.items()}
        self._contexts: dict[str, list[str]] = {name: [] for name in followed}
        self._runs: list[_ClockedRun] = []
        self._callbacks = 0
        self._within = 0  # runs of the pipeline that began within the running one
        self._last: Trajectory | None = None
        self._call: _RunningCall | None = None
        self._encoding: Encoding | None = None
        self._encoder: tuple[str, tuple[str, ...] | ClockUnknown] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(listen_to_pipeline(self.pipe, self))
            for name, module in {**self.denoisers, **self.beside}.items():
                stack.enter_context(listen_to_context(module, self._contexts[name]))
                stack.enter_context(listen_to_calls(module, self._hear(name), self._end_call))
            for name, module in self.text_encoders.items():
                stack.enter_context(
                    listen_to_calls(module, self._hear_text(name), self._end_encoding)
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        for run in self._runs:
            run.close()
        self._runs.clear()
        self._callbacks = self._within = 0
        self._call = self._encoding = self._encoder = None

    def now(self) -> DenoiserCall:
        """Time and branches of the denoiser call that is running.

        Raises:
            ClockUnknown: no denoiser of this pipeline is running, or its time or branch cannot be
                known.
        """
        call = self._call
        if call is not None and call.moment is not None:
            return call.moment
        instant, branches = self.time(), self.branches()
        moment = DenoiserCall(**vars(instant), branches=branches)
        if call is not None:
            call.moment = moment
        return moment

    def time(self) -> StepInfo:
        """Time of the denoiser call that is running; known also where the branch is not.

        Raises:
            ClockUnknown: no denoiser of this pipeline is running, or its time cannot be known.
        """
        if self._call is None:
            raise ClockUnknown(self._idle("step"))
        return _require_known(self._call.instant)

    def branches(self) -> tuple[str, ...]:
        """Names of the equal chunks of the batch of the running denoiser or text encoder.

        Raises:
            ClockUnknown: neither is running, or the branch cannot be known.
        """
        if self._call is not None:
            return _require_known(self._call.branches)
        if self._encoder is not None:
            return _require_known(self._encoder[1])
        raise ClockUnknown(self._idle("branch"))

    @property
    def schedule(self) -> list[StepInfo]:
        """The steps of the running or latest run, from its first one to the end of the schedule.

        Empty until a denoiser has been called.
        """
        trajectory = self._trajectory
        return [] if trajectory is None else trajectory.steps()

    @property
    def entries(self) -> list[StepInfo]:
        """Like `schedule`, with every evaluation of the steps of second-order solvers."""
        trajectory = self._trajectory
        return [] if trajectory is None else trajectory.entries()

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the running call of the pipeline was given, with its defaults; empty in none."""
        return self._runs[-1].arguments if self._runs else {}

    @property
    def _trajectory(self) -> Trajectory | None:
        return self._runs[-1].trajectory if self._runs else self._last

    def aside(self) -> str | None:
        """Why what is being called is not part of the run that is going on; None where it is."""
        if self._callbacks:
            return "it is called in a callback of the running pipeline, maybe by another one"
        if self._within:
            return "it is called by a run of the pipeline that began within the running one"
        if self._call is not None and self._call.aside is not None:
            return self._call.aside
        other = other_caller(self.pipe) if self._runs else None
        if other is not None:
            return f"it is called by another pipeline ({other}) while this one runs"
        return None

    # what the listeners tell

    def run_began(self, arguments: Mapping[str, Any]) -> None:
        """A call of the pipeline begins: nothing of an earlier one is believed any more."""
        if self._runs:
            self._within += 1
            return
        self._runs.append(_ClockedRun(self.pipe, arguments))
        self._call = self._encoding = self._encoder = None
        for names in self._contexts.values():
            names.clear()

    def run_ended(self, failed: bool) -> None:
        """The call is over; timesteps that could not be read without waiting are compared now."""
        if self._within:
            self._within -= 1
            self._runs[-1].interrupted = True
            return
        self._call = None
        run = self._runs.pop() if self._runs else None  # the clock may have been closed meanwhile
        if run is not None:
            run.close()
        if run is not None and run.trajectory is not None:
            self._last = run.trajectory
            if not failed:
                run.settle()

    def callback_began(self) -> None:
        """The pipeline calls back: what runs now is not the run."""
        self._callbacks += 1

    def callback_ended(self) -> None:
        """The run goes on."""
        self._callbacks = max(self._callbacks - 1, 0)
        if self._runs and not self._callbacks:
            self._runs[-1].interrupted = True

    def encoding_began(self, arguments: Mapping[str, Any]) -> None:
        """`encode_prompt` begins."""
        if self.aside() is not None:
            return
        run = self._runs[-1].arguments if self._runs else None
        own = own_class(self.pipe)
        names = embedded_branches(own, arguments, run)
        self._encoding = Encoding(encoder_calls(own, arguments, run), names)

    def encoding_ended(self, result: Any) -> None:
        """`encode_prompt` is over, with these embeddings."""
        if self.aside() is not None:
            return
        encoding, self._encoding = self._encoding, None
        if self._runs and encoding is not None:
            self._runs[-1].branches.heard.keep(encoding.embedded, result)

    def _hear(self, name: str):
        parameters = self._parameters[name]
        sample_name = parameters.first_of(_SAMPLE)
        timestep_name = parameters.first_of(_TIMESTEP)
        embedding_name = parameters.first_of(_EMBEDDING)
        added_name = parameters.first_of(("added_cond_kwargs",))
        skips_name = parameters.first_of(("skip_layers",))
        names = self._contexts[name]
        is_beside = name in self.beside
        module = self.beside[name] if is_beside else self.denoisers[name]
        inner = innermost(module)
        own = f"{name}_scheduler"
        scheduler_name = own if getattr(self.pipe, own, None) is not None else "scheduler"

        def began(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            outer, why = self._call, self.aside()
            if why is None and outer is not None:
                why = f"it is called while a call of {outer.name} runs, so it is not the run's own"
            self._call = call = _RunningCall(name, outer, why)
            if why is not None:
                if self._runs:
                    self._runs[-1].interrupted = True
                call.instant = call.branches = ClockUnknown(f"{name} has no step or branch: {why}")
                return
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
                trajectory = run.trajectory_of(scheduler_name, inner)
                index = trajectory.locate(timestep, _precision(timestep, sample))
                call.instant = trajectory.instant(index)
            except ClockUnknown as error:
                call.instant = error
            batch = len(sample) if isinstance(sample, Tensor | list) else None
            embedding = parameters.get(embedding_name, args, kwargs)
            if embedding is None and (added := parameters.get(added_name, args, kwargs)):
                embedding = added.get("image_embeds")
            try:
                if is_beside:
                    call.branches = run.branches.beside(batch, embedding)
                    return
                call.branches = run.branches.of(
                    names[-1] if names else None,
                    index,
                    batch,
                    embedding,
                    parameters.get(skips_name, args, kwargs) is not None,
                )
            except ClockUnknown as error:
                call.branches = error

        return began

    def _end_call(self) -> None:
        self._call = None if self._call is None else self._call.outer

    def _hear_text(self, name: str):
        def began(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            why = self.aside()
            if why is not None:
                self._encoder = (name, ClockUnknown(f"{name} has no branch: {why}"))
            elif self._encoding is None:
                reason = (
                    f"{name} was called outside encode_prompt, so whose prompt it reads is unknown"
                )
                self._encoder = (name, ClockUnknown(reason))
            else:
                self._encoder = (name, self._encoding.next_of(name))

        return began

    def _end_encoding(self) -> None:
        self._encoder = None

    def _idle(self, what: str) -> str:
        if self._stack is None:
            return "the clock follows the pipeline only inside its with block"
        if self._encoder is not None:
            return f"{self._encoder[0]} runs before the first denoising step: it has no {what}"
        known = ", ".join(self.denoisers) or "it has none"
        return f"no denoiser of the pipeline ({known}) is running: no {what}"


class _ClockedRun:
    """What is known about one call of the pipeline."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]):
        self.pipe = pipe
        self.arguments = arguments
        self.interrupted = False
        own = own_class(pipe)
        self.branches = Branches(pipe, own, layout_of(own), arguments)
        self.trajectory: Trajectory | None = None
        self._trajectories: dict[tuple[int, type], Trajectory] = {}
        self._stack = ExitStack()
        guider = listen_to_guider(getattr(pipe, "guider", None))
        self.branches.passes = self._stack.enter_context(guider)

    def close(self) -> None:
        self._stack.close()

    def settle(self) -> None:
        for trajectory in self._trajectories.values():
            trajectory.settle()

    def trajectory_of(self, scheduler_name: str, denoiser: nn.Module) -> Trajectory:
        """The schedule that the pipeline has set for a denoiser; read anew when it sets another.

        Raises:
            ClockUnknown: it has none, or something that ran in between has set another.
        """
        scheduler = getattr(self.pipe, scheduler_name, None)
        if scheduler is None or getattr(scheduler, "timesteps", None) is None:
            raise ClockUnknown(f"{self.branches.family} has no scheduler with timesteps")
        inner = type(denoiser)
        key = id(scheduler), inner  # a second denoiser of the class goes on with the first one's
        trajectory = self._trajectories.get(key)
        if trajectory is None or trajectory.source is not scheduler.timesteps:
            form, config = form_of(inner, type(scheduler)), getattr(denoiser, "config", None)
            new = Trajectory(scheduler, form, config, has_clean_tokens(inner))
            if trajectory is not None and self.interrupted and new.values != trajectory.values:
                raise ClockUnknown(
                    f"the schedule of {type(scheduler).__name__} was set anew in a callback "
                    "or another run, while the pipeline goes on with the one that it had set"
                )
            self._trajectories[key] = trajectory = new
        self.interrupted = False
        self.trajectory = trajectory
        return trajectory


def _modules(pipe: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name in names:
        module = getattr(pipe, name, None)
        # one module of two names is one: its call would seem to run within itself
        if isinstance(module, nn.Module) and all(module is not each for each in found.values()):
            found[name] = module
    return found


def _require_known(value: Any) -> Any:
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
