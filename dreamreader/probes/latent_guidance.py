"""Guidance of the latents by a probe on activations: classifier guidance through the denoiser."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import (
    DenoiserCall,
    Evaluation,
    Reader,
    Site,
    in_steps,
    normalized_steps,
    stepping,
)
from dreamreader.errors import InvalidInput, NeverFired, UnknownName
from dreamreader.probes.objectives import OBJECTIVES, label_targets, objective_values
from dreamreader.probes.prediction import weight
from dreamreader.probes.probe import Probe
from dreamreader.probes.rows import pool_values


@dataclass
class Guided:
    """What guidance did, by step.

    Attributes:
        value: of the objective before the step, for each row.
        gradient: norm of its gradient with respect to the latents, for each row.
        skipped: steps that were asked for and could not be guided, with the reason.
    """

    value: dict[int, Float[Tensor, " rows"]] = field(default_factory=dict)
    gradient: dict[int, Float[Tensor, " rows"]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)


@contextmanager
def latent_guidance(
    reader: Reader,
    probe: Probe,
    target: Any = None,
    avoid: Any = None,
    scale: float | Sequence[float] = 1.0,
    *,
    steps: Any = None,
    objective: str = "probability",
    branch: str | None = None,
    site: str | None = None,
    checkpoint: bool = False,
) -> Iterator[Guided]:
    """Guides the pipeline's latents, while it runs in this block, by what a probe reads inside.

    At each step the gradient of the objective with respect to the latents x_t is taken through the
    denoiser as far as the probe's site, where it is left. It changes the prediction that the
    scheduler gets, after the pipeline's own guidance.

    Formula: eps' = eps - sqrt(1 - abar) scale grad_x log p(target | h(x_t)), in the terms of the
    scheduler's prediction: v' = v + d / alpha, x_0' = x_0 - sigma d / alpha, and with flow matching
    v' = v + d / (1 - sigma), for the change d of eps.

    The gradient is that of the denoiser as it runs, with the edits of this reader. Nothing global
    changes: no gradient mode, no `requires_grad`, and no hook is left behind.

    Args:
        reader: of a diffusers pipeline.
        probe: on activations of a site of the denoiser, whose tokens are all pooled.
        target, avoid: labels, as `ProbeGuidance` takes them: a label or a set for all rows, or a
            list with one entry for each row.
        scale: strength, one number or one for each row; 0 leaves a row bit for bit.
        steps: of denoising, as in `Record`. A step at pure noise has no finite change where v or
            x_0 is predicted; it is left out, and said so in the result.
        objective: `probability`, the log of the calibrated probability of the target, or that
            nothing to avoid is the case; or `logits`, the mean of the logits to reach less the mean
            of those to leave (K-steering).
        branch: whose activations are read; that of the probe, else `cond`.
        site: where the probe was trained on rows without one.
        checkpoint: use the denoiser's gradient checkpointing: less memory, more time.

    Yields:
        What guidance did, filled while the pipeline runs.

    Raises:
        InvalidInput: no diffusers pipeline, a site outside its denoiser, an unknown prediction, a
            probe of another width, labels or scales for another number of rows.
        UnknownName: of a label, site or objective.
        NeverFired: no step was guided.

    Example:
        >>> with latent_guidance(reader, probe, target="red", scale=20.0):   # doctest: +SKIP
        ...     reader.run("a large star", seeds=0)

    Reference:
        Dhariwal and Nichol, Diffusion models beat GANs on image synthesis (2021).
    """
    guide = _LatentGuide(reader, probe, target, avoid, scale, objective, branch, site, checkpoint)
    guide.steps = normalized_steps(steps, "latent_guidance: steps")
    with ExitStack() as stack:
        guide.attach(stack)
        yield guide.found
    if not guide.found.value and any(each != 0 for each in guide.scale):
        raise NeverFired(
            f"latent_guidance by {probe!r}: no step was guided ({guide.explain_silence()})"
        )


class _LatentGuide:
    """Takes the gradient while the denoiser runs, and hands it to the scheduler's step."""

    def __init__(
        self,
        reader: Reader,
        probe: Probe,
        target: Any,
        avoid: Any,
        scale: Any,
        objective: str,
        branch: str | None,
        site: str | None,
        checkpoint: bool,
    ):
        self.reader, self.pipe = reader, reader.subject
        if reader.kind != "pipeline" or getattr(self.pipe, "scheduler", None) is None:
            raise InvalidInput(
                f"latent_guidance needs a diffusers pipeline with a scheduler, got {reader.name}"
            )
        if objective not in OBJECTIVES:
            raise UnknownName("objective of latent_guidance", objective, OBJECTIVES)
        if probe.task.kind == "regress" and objective == "probability":
            raise InvalidInput("latent_guidance: a regression has no probabilities; use 'logits'")
        self.probe, self.objective, self.checkpoint = probe, objective, checkpoint
        self.reach, self.leave = label_targets(probe, target, avoid)
        self.scale = [float(each) for each in (scale if hasattr(scale, "__len__") else [scale])]
        self.branch = branch or probe.branch or "cond"
        self.site = self._site(site or probe.site)
        self.steps: Any = None
        self.found = Guided()
        self.change: tuple[DenoiserCall, Tensor] | None = None
        self.missed: list[str] = []

    def _site(self, name: str | None) -> Site:
        if name is None:
            raise InvalidInput("latent_guidance: the probe has no site of its own; give site=")
        found = self.reader.sites(name)
        if len(found) > 1 or found[0].stream is not None or found[0].port == "probs":
            raise InvalidInput(f"latent_guidance: {name} is not one whole site of activations")
        if found[0].component not in self.reader.denoisers:
            known = ", ".join(self.reader.denoisers)
            raise InvalidInput(f"latent_guidance: {name} is not inside the denoiser ({known})")
        return found[0]

    def attach(self, stack: ExitStack) -> None:
        stack.enter_context(stepping(self.pipe.scheduler, self._step))
        stack.enter_context(self.reader.replay(self._after, denoiser=self.site.component))

    def _step(self, step: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        call.arguments["model_output"] = self.take_change(call.arguments["model_output"])
        return step(*call.args, **call.kwargs)

    def explain_silence(self) -> str:
        if self.found.skipped:
            return "; ".join(f"step {n}: {why}" for n, why in self.found.skipped.items())
        return self.missed[-1] if self.missed else "the denoiser did not run"

    def _after(self, call: Evaluation, output: Any) -> None:
        moment = call.moment
        if self.change is not None and self.change[0].timestep != moment.timestep:
            raise InvalidInput(
                f"latent_guidance: the pipeline did not step with the {_name(self.pipe.scheduler)} "
                "that it had at the beginning"
            )
        if self.branch not in moment.branches:
            self.missed.append(f"branch {self.branch!r} of {', '.join(moment.branches)}")
        elif not in_steps(self.steps, moment.step, call.total):
            self.missed.append(f"steps={self.steps!r} of {call.total}")
        elif any(self.scale):
            self._guide(call, moment)

    def _guide(self, call: Evaluation, moment: DenoiserCall) -> None:
        """Take the gradient of each row, and keep the change for the scheduler's step."""
        w = weight(self.pipe.scheduler, moment)
        if w is None:
            self.found.skipped[moment.step] = "pure noise, where the change is not finite"
            return
        batch = len(call.sample)
        rows = batch // len(moment.branches)
        first = moment.branches.index(self.branch) * rows
        mine = slice(first, first + rows)

        def objective(h: Tensor) -> Tensor:
            if len(h) != batch:
                raise InvalidInput(
                    f"latent_guidance: {self.site.name} has {len(h)} entries for {batch} latents"
                )
            return self._value(h[mine], moment)  # [rows]

        value, grad = call.gradient(self.site, objective, self.checkpoint)
        grad = grad[mine].float()
        self.found.value[moment.step] = value.float().cpu()
        self.found.gradient[moment.step] = grad.flatten(1).norm(dim=1).cpu()
        scale = self._per_row(torch.tensor(self.scale, device=grad.device), len(grad), "scale")
        self.change = moment, w * scale.reshape(-1, *[1] * (grad.dim() - 1)) * grad

    def _value(self, h: Float[Tensor, "rows tokens features"], moment: DenoiserCall) -> Tensor:
        probe = self.probe
        read = pool_values(h.unsqueeze(1), probe.pool).squeeze(1)  # [rows, tokens or 1, features]
        fraction = moment.fraction if probe.noise_conditioned else None
        logits = probe.logits(read, step=moment.step, fraction=fraction)
        reach, leave = (self._per_row(e, len(h), "labels") for e in (self.reach, self.leave))
        return objective_values(probe, moment.step, logits, reach, leave, self.objective)

    @staticmethod
    def _per_row(values: Tensor, rows: int, what: str) -> Tensor:
        if len(values) not in (1, rows):
            raise InvalidInput(
                f"latent_guidance: {what} for {len(values)} rows, the pipeline runs {rows} at once"
            )
        return values.expand(rows, *values.shape[1:])

    def take_change(self, prediction: Tensor) -> Tensor:
        """The prediction with the change that waits for it."""
        waiting, self.change = self.change, None
        if waiting is None:
            return prediction
        change = waiting[1]
        if prediction.shape != change.shape:
            raise InvalidInput(
                f"latent_guidance: the scheduler steps {list(prediction.shape)}, the denoiser has "
                f"latents {list(change.shape)}; pipelines that add channels are not supported"
            )
        wide = torch.promote_types(prediction.dtype, torch.float32)
        moved = (prediction.to(wide) + change.to(wide)).to(prediction.dtype)
        still = torch.tensor(self.scale, device=change.device) == 0
        still = still.expand(len(change)).reshape(-1, *[1] * (change.dim() - 1))
        return torch.where(still, prediction, moved)


def _name(value: object) -> str:
    return type(value).__name__
