"""Edits that change only the predicted picture of each denoising step (h-space editing, Asyrp).

Inside the block the denoiser is evaluated twice where an edit is at work: with the edits and
without. Both predictions travel through the pipeline's own guidance as one `Twin` tensor, and the
scheduler's step puts them together. So guidance may be anything, also what is not linear in the
predictions (`guidance_rescale`, normalised true guidance, truncation).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from dreamreader.engine import (
    EditRequest,
    Evaluation,
    FiringReport,
    Reader,
    cache_hooks,
    pick,
    put,
)
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
    pipe = reader.subject
    if reader.kind != "pipeline" or getattr(pipe, "scheduler", None) is None:
        raise InvalidInput(
            f"asymmetric needs a diffusers pipeline with a scheduler, got {reader.name}"
        )
    _refuse_step_caches(reader)
    with ExitStack() as stack:

        def follow(call: Evaluation | None = None) -> None:
            """Take over the steps of the scheduler that the pipeline has now."""
            given = [] if call is None else call.arguments.values()
            if any(isinstance(each, Twin) for each in given):
                raise InvalidInput(
                    "the denoiser was given a prediction that did not go through the step of "
                    "pipe.scheduler: the pipeline steps with something else"
                )
            if not hasattr(pipe.scheduler.step, MARK):
                stack.enter_context(split_steps(pipe.scheduler, boost))

        if hasattr(pipe.scheduler.step, MARK):
            raise InvalidInput("asymmetric is on for this pipeline already")
        follow()
        stack.enter_context(reader.replay(_twice, before=follow))
        report = FiringReport()
        if edits:
            report = stack.enter_context(reader.editing(edits))
        yield report


def _twice(call: Evaluation, output: Any) -> Any:
    """The output beside that without the reader's edits, where these did something."""
    if not call.is_edited:
        return None
    name = type(call.module).__name__
    plain = pick(call.again(edits=False), None, name)
    return put(output, None, Twin.of(pick(output, None, name), plain))


def _refuse_step_caches(reader: Reader) -> None:
    inside = [each for denoiser in reader.denoisers.values() for each in denoiser.modules()]
    names = {name for each in inside for name in cache_hooks(each)}
    if names:
        raise InvalidInput(
            "asymmetric evaluates the denoiser twice in a step, which step caches cannot tell "
            f"apart; disable {', '.join(sorted(names))}"
        )
