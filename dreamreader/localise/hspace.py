"""Edits that change only the predicted picture of each denoising step (h-space editing, Asyrp).

Inside the block the denoiser is evaluated twice where an edit is at work: with the edits and
without. Both predictions travel through the pipeline's own guidance as one `Twin` tensor, and the
scheduler's step puts them together. So guidance may be anything, also what is not linear in the
predictions (`guidance_rescale`, normalised true guidance, truncation).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dreamreader.engine import EditRequest, FiringReport, Reader
from dreamreader.engine.clock import Clock
from dreamreader.engine.step_caches import cache_hooks
from dreamreader.engine.subject import Subject
from dreamreader.engine.taps import pick, put
from dreamreader.errors import InvalidInput
from dreamreader.localise.hspace_steps import MARK, split_steps
from dreamreader.localise.hspace_twin import Twin


@contextmanager
def asymmetric(
    reader: Reader,
    edits: EditRequest | Sequence[EditRequest] = (),
    *,
    boost: float | None = None,
) -> Iterator[FiringReport]:
    """Let the reader's edits change the predicted picture of a step, but not its direction.

    `x_{t-1} = sqrt(a_{t-1}) P_t(eps(x_t | h + dh)) + D_t(eps(x_t)) + s_t z`, with `P_t` the
    predicted x_0 and `D_t` the part that points to x_t. An edit of both parts nearly cancels
    itself in the course of a run; this one does not. Schedulers with other noise levels are the
    same rule in their own variables: Euler `x_0(edited) + sigma' eps`, flow matching
    `(1 - sigma') x_0(edited) + sigma' noise`.

    It holds for every edit of this reader inside the block, those given here and those of `run` and
    `editing`, and for their selections: a step or row without an edit is computed as ever, and
    strength 0 is bit-equal to no edit. Recordings see the edited evaluation. An edit outside the
    denoiser (a text encoder) has no such split and acts on both parts.

    Args:
        reader: of a diffusers pipeline.
        edits: usually of the mid-block's output, the h-space: `unet.mid_block`.
        boost: timestep at and below which DDIM draws fresh noise (eta = 1), edited or not; the
            paper's quality boost. None: as the pipeline is called.

    Yields:
        The firing report of `edits`, filled when the block ends.

    Raises:
        InvalidInput: the reader has no pipeline; the step of its scheduler has no such split; a
            step cache is on.
        NeverFired: one of `edits` matched nothing in the block.

    Example:
        >>> with asymmetric(reader):                                    # doctest: +SKIP
        ...     reader.run("a red circle", edits=Steer("unet.mid_block", v, alpha=[0, 2, 4]))

    Reference:
        Kwon, Jeong, Uh (2023), Diffusion Models Already Have a Semantic Latent Space (Asyrp).
    """
    subject = reader._subject
    if subject.kind != "pipeline" or getattr(subject.model, "scheduler", None) is None:
        raise InvalidInput(
            f"asymmetric needs a diffusers pipeline with a scheduler, got {subject.name}"
        )
    pipe = subject.model
    with ExitStack() as stack:

        def follow() -> None:
            """Take over the steps of the scheduler that the pipeline has now."""
            if not hasattr(pipe.scheduler.step, MARK):
                stack.enter_context(split_steps(pipe.scheduler, boost))

        if hasattr(pipe.scheduler.step, MARK):
            raise InvalidInput("asymmetric is on for this pipeline already")
        follow()
        for module in Clock(pipe).denoisers.values():
            stack.enter_context(_Twice(subject, module, follow).hooked())
        report = FiringReport()
        if edits:
            report = stack.enter_context(reader.editing(edits))
        yield report


class _Twice:
    """Evaluates a denoiser a second time, without the reader's edits, where they did something."""

    def __init__(self, subject: Subject, module: nn.Module, follow: Callable[[], None]):
        self.subject = subject
        self.module = module
        self.follow = follow
        self.given: tuple[Any, Any] = ((), {})
        self.edited = 0
        self.last: Any = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        names = [name for each in self.module.modules() for name in cache_hooks(each)]
        if names:
            raise InvalidInput(
                "asymmetric evaluates the denoiser twice in a step, which step caches cannot tell "
                f"apart; disable {', '.join(sorted(set(names)))}"
            )
        # Before every other hook: an edit of the denoiser's own input must not reach `given`.
        first = self.module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        self.last = self.module.register_forward_hook(self._after)
        try:
            yield
        finally:
            first.remove()
            self.last.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(isinstance(each, Twin) for each in (*args, *kwargs.values())):
            raise InvalidInput(
                "the denoiser was given a prediction that did not go through the step of "
                "pipe.scheduler: the pipeline steps with something else"
            )
        self.follow()
        hooks: Any = module._forward_hooks
        hooks.move_to_end(self.last.id)  # after edits and recordings of the denoiser's own output
        # Some denoisers use up lists and dictionaries that they are given (adapters' residuals).
        self.given = (tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items()})
        self.edited = self.subject.edited

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        given, self.given = self.given, ((), {})
        if self.subject.edited == self.edited:
            return None
        self.subject.paused = True
        try:
            # not the module's call: clock and trackers hear of one evaluation
            plain = module.forward(*given[0], **given[1])
        finally:
            self.subject.paused = False
        name = type(module).__name__
        return put(output, None, Twin.of(pick(output, None, name), pick(plain, None, name)))


def _copied(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, dict) else value
