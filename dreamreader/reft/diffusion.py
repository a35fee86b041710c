"""Losses on the predictions of a denoiser: a teacher's, and those of given pictures."""

import torch
from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.recording.calls import Calls
from dreamreader.reft.losses import Batch, ModelLoss
from dreamreader.reft.model import Reft

_TOGETHER = 4  # calls of a row whose targets are computed at once


class NoiseMatch(ModelLoss):
    """The edited prediction for the base prompt against the unedited one for the teacher's prompt.

    Formula: mean (eps(x_t, base; edited) - eps(x_t, teacher))^2, on the same latents x_t.

    Args:
        reader: of the pipeline.
        base, teacher: calls of paired prompts (`record_calls`) with the same steps; the same calls
            twice keep a prompt as it is.
        trajectory: whose latents: `base` or `teacher`.

    Raises:
        InvalidInput: the calls have different numbers of rows or steps.
    """

    def __init__(self, reader: Reader, base: Calls, teacher: Calls, trajectory: str = "base"):
        super().__init__(reader)
        if (base.rows, base.moments) != (teacher.rows, teacher.moments):
            raise InvalidInput(
                f"base has {base.rows} rows of {len(base.moments)} calls, the teacher "
                f"{teacher.rows} of {len(teacher.moments)}"
            )
        self.base, self.teacher = base, teacher
        self.latents = (base if trajectory == "base" else teacher).latents
        self.rows, self.moments = base.rows, len(base.moments)
        self._targets: dict[tuple[int, int], Tensor] = {}  # by row and block of its calls

    def terms(self, reft: Reft, batch: Batch) -> dict[str, Tensor]:
        x = self.latents[batch.rows, batch.moments]
        target = self._target(batch)
        at = self.base.steps(batch.moments) if reft.steps is not None else None
        edits = [*reft.edits(graph=True, at=at), *self._watching]
        with self.reader.editing(edits):
            found = self.base(batch.rows, batch.moments, x)
        return {"noise": (found.float() - target.float()).square().mean()}

    def _target(self, batch: Batch) -> Tensor:
        """The teacher's predictions, each computed once."""
        found = []
        for row, moment in zip(batch.rows.tolist(), batch.moments.tolist(), strict=True):
            block, place = divmod(moment, _TOGETHER)
            if (row, block) not in self._targets:
                self._targets[row, block] = self._compute(row, block)
            found.append(self._targets[row, block][place])
        return torch.stack(found)

    @torch.no_grad()
    def _compute(self, row: int, block: int) -> Tensor:
        """Always of the same calls at once: what is beside a call shows in its last bits, and a
        training that goes on has other calls before it than one that was not stopped."""
        start = block * _TOGETHER
        moments = torch.arange(start, min(start + _TOGETHER, self.moments))
        rows = torch.full_like(moments, row)
        return self.teacher(rows, moments, self.latents[rows, moments])


class Denoising(ModelLoss):
    """The loss that the denoiser was trained with, on given pictures and their prompts.

    Formula: mean (m(x_t) - m*)^2 with x_t the picture under fresh noise n at the noise level s of a
    step. Flow matching: x_t = (1 - s) x_0 + s n and m* = n - x_0. Otherwise, with a = 1 / sqrt(1 +
    s^2): x_t = a (x_0 + s n), and m* = n, x_0 or a (n - s x_0), as the scheduler predicts noise,
    picture or velocity.

    Args:
        reader: of the pipeline.
        calls: of the prompts, one row for each picture; its latents are not used.
        pictures: latents x_0 in the form that the denoiser has them in, see `encode_images`.

    Raises:
        InvalidInput: shapes differ from the denoiser's, or the noise of the scheduler is not known.
    """

    def __init__(self, reader: Reader, calls: Calls, pictures: Float[Tensor, "rows ..."]):
        super().__init__(reader)
        if pictures.shape != calls.latents[:, 0].shape:
            raise InvalidInput(
                f"pictures must be latents {list(calls.latents[:, 0].shape)}, as the denoiser has "
                f"them, got {list(pictures.shape)}"
            )
        self.calls = calls
        self.pictures = pictures.to(calls.latents)
        self.kind = prediction_of(reader, calls)
        self.rows, self.moments = calls.rows, len(calls.moments)

    def terms(self, reft: Reft, batch: Batch) -> dict[str, Tensor]:
        x_0 = self.pictures[batch.rows].float()
        noise = torch.randn(x_0.shape, generator=batch.generator).to(x_0)
        levels = [self.calls.moments[each].sigma for each in batch.moments.tolist()]
        s = torch.tensor(levels).to(x_0).reshape(-1, *[1] * (x_0.dim() - 1))
        x_t, target = add_noise(x_0, noise, s, self.kind)
        at = self.calls.steps(batch.moments) if reft.steps is not None else None
        edits = [*reft.edits(graph=True, at=at), *self._watching]
        with self.reader.editing(edits):
            found = self.calls(batch.rows, batch.moments, x_t.to(self.pictures.dtype))
        if found.shape[1] == 2 * target.shape[1]:  # some also predict their variance
            found = found.chunk(2, 1)[0]
        return {"denoising": (found.float() - target).square().mean()}


def add_noise(x_0: Tensor, noise: Tensor, s: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x_t and what the denoiser should say of it, at noise levels s; see `Denoising`."""
    if kind == "flow":
        return (1 - s) * x_0 + s * noise, noise - x_0
    a = (1 + s**2).rsqrt()
    targets = {"epsilon": noise, "sample": x_0, "v_prediction": a * (noise - s * x_0)}
    return a * (x_0 + s * noise), targets[kind]


def prediction_of(reader: Reader, calls: Calls) -> str:
    """What the denoiser predicts: `flow`, `epsilon`, `sample` or `v_prediction`.

    Raises:
        InvalidInput: it is something else, or the scheduler has no noise levels.
    """
    scheduler = reader.subject.scheduler
    name = type(scheduler).__name__
    kind = scheduler.config.get("prediction_type")
    if type(calls.denoiser).__name__.startswith("Lumina") or name.startswith(("EDM", "Cosine")):
        raise InvalidInput(
            f"the denoising loss of {name} with {type(calls.denoiser).__name__} is not known"
        )
    if any(each.sigma is None for each in calls.moments):
        raise InvalidInput(f"{name} has no noise levels, which the denoising loss needs")
    if name.startswith("FlowMatch") or kind == "flow_prediction":
        return "flow"
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise InvalidInput(
            f"{name} predicts {kind!r}; epsilon, sample, v_prediction or flow is known"
        )
    return kind


def encode_images(
    reader: Reader, pictures: Float[Tensor, "rows 3 height width"], batch_size: int = 8
) -> Tensor:
    """Latents of pictures with values from 0 to 1, by the pipeline's autoencoder.

    Returns:
        [rows, channels, height, width], scaled and shifted as the denoiser has them.

    Raises:
        InvalidInput: values are out of range, or the autoencoder normalises each channel.
    """
    if pictures.dim() != 4 or not 0 <= float(pictures.min()) <= float(pictures.max()) <= 1:
        raise InvalidInput(
            f"pictures must be [rows, 3, height, width] from 0 to 1, got {list(pictures.shape)}"
        )
    vae = reader.subject.vae
    if vae.config.get("latents_mean") is not None or "scaling_factor" not in vae.config:
        raise InvalidInput(
            f"pictures: how {type(vae).__name__} scales latents is not known, it normalises each "
            "channel or has no scaling_factor; encode them yourself"
        )
    weight = next(vae.parameters())
    shift = vae.config.get("shift_factor") or 0.0
    found = []
    with torch.no_grad():
        for part in pictures.split(batch_size):
            coded = vae.encode((2 * part - 1).to(weight.device, weight.dtype))
            posterior = getattr(coded, "latent_dist", None)
            latents = coded.latent if posterior is None else posterior.mode()
            found.append((latents - shift) * vae.config.scaling_factor)
    return torch.cat(found)
