"""Calls of a denoiser handed on while a pipeline runs, to be kept or made again beside the run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamreader.engine._clock import Clock, DenoiserCall
from dreamreader.engine._clock_run import Parameters
from dreamreader.engine._site_view import read_site
from dreamreader.engine._sites import Site
from dreamreader.engine._subject import Subject, is_compiled, unwrap
from dreamreader.engine._taps import Argument, pick
from dreamreader.errors import InvalidInput


class Evaluation:
    """One call of a denoiser, valid until the call is over.

    Attributes:
        component: name of the denoiser in the pipeline. module: the denoiser.
        args, kwargs: what it was called with, before any edit of its own input. Lists and
            dictionaries are copies, since some denoisers use up those that they are given.
    """

    def __init__(
        self,
        subject: Subject,
        clock: Clock,
        component: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self.component = component
        self.module = module
        self.args = tuple(map(_copy, args))
        self.kwargs = {name: _copy(value) for name, value in kwargs.items()}
        self._subject = subject
        self._clock = clock
        self._edited = subject.edited
        self._is_over = False

    @cached_property
    def moment(self) -> DenoiserCall:
        """Time and branches.

        Raises:
            ClockUnknown: they cannot be known.
            InvalidInput: the call is over, and they were not asked for while it ran.
        """
        self._need_running("moment")
        return self._clock.now()

    @property
    def total(self) -> int | None:
        """Steps of the run; None where its schedule does not say."""
        schedule = self._clock.schedule
        return schedule[-1].step + 1 if schedule else None

    @property
    def arguments(self) -> dict[str, Any]:
        """What the denoiser was called with, by name."""
        return Parameters(self.module).bind(self.args, self.kwargs)

    @property
    def sample(self) -> Tensor:
        """The denoiser's first argument, its latents.

        Raises:
            InvalidInput: it is no tensor.
        """
        argument = Argument(unwrap(self.module), None)
        sample = argument.get(self.args, self.kwargs)
        if not isinstance(sample, Tensor):
            raise InvalidInput(
                f"{argument.name} of {type(self.module).__name__} is a {type(sample).__name__}, a "
                "tensor is needed"
            )
        return sample

    @property
    def is_edited(self) -> bool:
        """Whether an edit of this reader has been applied since the call began.

        Raises:
            InvalidInput: the call is over.
        """
        self._need_running("is_edited")
        return self._subject.edited != self._edited

    def again(self, edits: bool = True) -> Any:
        """The denoiser's result for the same arguments once more; nothing is recorded or reported.

        Args:
            edits: whether those of the reader act on modules inside. On the denoiser's own input
                and output they never do.

        Raises:
            InvalidInput: the call is over, and with it the edits that acted on it.
        """
        self._need_running("again()")
        with self._beside(edits):
            # not the module's call: clock and trackers hear of one evaluation
            return self.module.forward(*self.args, **self.kwargs)

    def gradient(
        self,
        site: Site,
        objective: Callable[[Float[Tensor, "batch tokens features"]], Tensor],
        checkpoint: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """An objective of the values at a site, and its gradient at the denoiser's input.

        The denoiser is evaluated once more, with the edits of the reader, as far as the site, where
        it is left. No gradient mode and no `requires_grad` changes beyond that.

        Args:
            site: inside the denoiser.
            objective: of the values there, heads side by side; gives one number or one for each of
                several rows, whose sum is differentiated.
            checkpoint: use the denoiser's gradient checkpointing: less memory, more time.

        Returns:
            What the objective gave, detached, and the gradient in the shape of the input.

        Raises:
            InvalidInput: inference mode is on, the denoiser's first argument is no tensor, it does
                not reach the site, it has no gradient checkpointing, or the call is over.
        """
        self._need_running("gradient()")
        if torch.is_inference_mode_enabled():
            raise InvalidInput(f"{site.name}: needs gradients, which inference_mode has not")
        denoiser, sample = unwrap(self.module), self.sample
        saver = _keep_checkpointing(denoiser) if checkpoint else nullcontext()
        with self._beside(True), saver, torch.enable_grad():
            x = sample.detach().clone().requires_grad_()
            args, kwargs = Argument(denoiser, None).replace(self.args, self.kwargs, x)
            value = objective(_value_at(site, denoiser, args, kwargs))
            (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad

    def _need_running(self, name: str) -> None:
        if self._is_over:
            raise InvalidInput(
                f"{name} of a call of {self.component} that is over: ask for it in before(call) or "
                "after(call, output), while the edits and the time of the call are there"
            )

    @contextmanager
    def _beside(self, edits: bool) -> Iterator[None]:
        """The denoiser is evaluated once more beside the run."""
        subject, name = self._subject, "rehearsing" if edits else "paused"
        before = getattr(subject, name)
        setattr(subject, name, True)
        try:
            yield
        finally:
            setattr(subject, name, before)


Before = Callable[[Evaluation], None]
After = Callable[[Evaluation, Any], Any]


@contextmanager
def replay_calls(
    subject: Subject, before: Before | None, after: After | None, denoiser: str | None
) -> Iterator[Clock]:
    """See `Reader.replay`."""
    if subject.kind != "pipeline":
        raise InvalidInput(f"calls of a denoiser need a pipeline, got {subject.name}")
    for name, given in (("before", before), ("after", after)):
        if given is not None and not callable(given):
            raise InvalidInput(f"replay: {name} takes a function of the call, got {given!r}")
    clock = Clock(subject.model)
    if denoiser is not None and denoiser not in clock.denoisers:
        known = ", ".join(clock.denoisers) or "none"
        raise InvalidInput(f"{subject.name} has no denoiser {denoiser!r}; it has {known}")
    with ExitStack() as stack:
        stack.enter_context(clock)
        for name, module in clock.denoisers.items():
            if denoiser in (None, name):
                if is_compiled(module):  # hooks are not seen by code that is compiled already
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(_hand_on(subject, clock, name, module, before, after))
        yield clock


@contextmanager
def _hand_on(
    subject: Subject,
    clock: Clock,
    component: str,
    module: nn.Module,
    before: Before | None,
    after: After | None,
) -> Iterator[None]:
    running: list[Evaluation] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hooks: Any = module._forward_hooks
        hooks.move_to_end(last.id)  # behind those that edit and record the denoiser's output
        running.append(Evaluation(subject, clock, component, module, args, kwargs))

    def begin(module: nn.Module, args: tuple) -> None:
        if before is not None:
            before(running[-1])

    def end(module: nn.Module, args: tuple, output: Any) -> Any:
        call = running.pop()
        try:
            return None if after is None else after(call, output)
        finally:
            call._is_over = True

    # The first of all hooks, as edits of the denoiser's input come later; then, where the clock
    # knows what is running, the caller's.
    first = module.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
    second = module.register_forward_pre_hook(begin)
    last = module.register_forward_hook(end)
    try:
        yield
    finally:
        for hook in (first, second, last):
            hook.remove()


class _Reached(Exception):
    """The site has its value: nothing further is computed."""

    def __init__(self, value: Tensor):
        super().__init__("reached")
        self.value = value


def _value_at(
    site: Site, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Float[Tensor, "batch tokens features"]:
    """The value of a site; the denoiser is left as soon as it is there.

    The hooks that sessions have on modules inside act as ever, and before this one looks.
    """
    with _leave_at(site):
        try:
            denoiser.forward(*args, **kwargs)  # not the module's call: the clock hears of one
        except _Reached as reached:
            return read_site(site, reached.value)
    raise InvalidInput(f"{site.name} was not reached in the denoiser")


@contextmanager
def _leave_at(site: Site) -> Iterator[None]:
    tap, armed = site.tap, True
    argument = Argument(tap.module, tap.argument) if tap.side in ("in", "delta") else None
    given: list[Tensor] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not armed or argument is None:  # checkpointing evaluates a part once more
            return
        value = argument.get(args, kwargs)
        if tap.side == "in":
            raise _Reached(value)
        given.append(value)

    def after(_: nn.Module, args: tuple, output: Any) -> None:
        if armed and tap.side != "in":
            value = pick(output, tap.element, site.name)
            raise _Reached(value - given.pop() if tap.side == "delta" else value)

    hooks = (
        tap.module.register_forward_pre_hook(before, with_kwargs=True),
        tap.module.register_forward_hook(after),
    )
    try:
        yield
    finally:
        armed = False
        for each in hooks:
            each.remove()


@contextmanager
def _keep_checkpointing(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser's own gradient checkpointing, as it was before afterwards."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (each, {name: vars(each)[name] for name in names if name in vars(each)})
        for each in denoiser.modules()
    ]
    try:
        try:
            denoiser.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        except (AttributeError, ValueError) as error:
            raise InvalidInput(
                f"{type(denoiser).__name__} has no gradient checkpointing"
            ) from error
        yield
    finally:
        for each, values in before:
            for name in names:
                vars(each).pop(name, None)
            vars(each).update(values)


def _copy(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, dict) else value
