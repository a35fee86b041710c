"""Hand-written loops of StableDiffusion and StableDiffusionXL."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .job import Job
from .timeline import walk
from .trace import Denoiser, Trace

BOTH = ("uncond", "cond")


def stable_diffusion(job: Job) -> Trace:
    cond, uncond = job.pipe.encode_prompt(
        job.prompts, "cpu", job.images, job.guided, job.negative() if job.guided else None
    )
    job.set_times()
    latents = job.noise(4, *job.latent_size(2)) * job.pipe.scheduler.init_noise_sigma
    return _denoise(job, latents, cond, uncond)


def stable_diffusion_img2img(job: Job) -> Trace:
    cond, uncond = job.pipe.encode_prompt(
        job.prompts, "cpu", job.images, job.guided, job.negative() if job.guided else None
    )
    latents, begin = _noised_image(job)
    return _denoise(job, latents, cond, uncond, begin=begin)


def stable_diffusion_xl(job: Job) -> Trace:
    job.set_times()
    latents = job.noise(4, *job.latent_size(2)) * job.pipe.scheduler.init_noise_sigma
    cond, uncond, extra = _xl_conditions(job, (job["height"], job["width"]))
    return _denoise(job, latents, cond, uncond, extra)


def stable_diffusion_xl_img2img(job: Job) -> Trace:
    latents, begin = _noised_image(job)
    height, width = job["image"].shape[-2:]
    cond, uncond, extra = _xl_conditions(job, (height, width))
    return _denoise(job, latents, cond, uncond, extra, begin)


def _xl_conditions(
    job: Job, size: tuple[int, int]
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    cond, uncond, pooled, pooled_uncond = job.pipe.encode_prompt(
        job.prompts,
        device="cpu",
        num_images_per_prompt=job.images,
        do_classifier_free_guidance=job.guided,
        negative_prompt=None,
    )
    # size before the crop, corner of the crop, wanted size
    times = torch.tensor([[*size, 0, 0, *size]], dtype=cond.dtype).repeat(job.rows, 1)
    if not job.guided:
        return cond, None, {"text_embeds": pooled, "time_ids": times}
    return (
        cond,
        uncond,
        {
            "text_embeds": torch.cat([pooled_uncond, pooled]),
            "time_ids": torch.cat([times, times]),
        },
    )


def _noised_image(job: Job) -> tuple[Tensor, int]:
    """The picture's latents with the noise of the first step run, and where that step begins."""
    scheduler, vae = job.pipe.scheduler, job.pipe.vae
    scheduler.set_timesteps(job.steps)
    skipped = max(job.steps - min(int(job.steps * job["strength"]), job.steps), 0)
    begin = skipped * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    pixels = 2 * job["image"] - 1
    clean = torch.cat(
        [
            vae.encode(pixels[row : row + 1]).latent_dist.sample(generator=generator)
            for row, generator in enumerate(job.generators)
        ]
    )
    clean = clean * vae.config.scaling_factor
    first = scheduler.timesteps[begin : begin + 1].repeat(job.rows)
    return scheduler.add_noise(clean, job.noise(*clean.shape[1:]), first), begin


def _denoise(
    job: Job,
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    extra: dict[str, Tensor] | None = None,
    begin: int = 0,
) -> Trace:
    scheduler = job.pipe.scheduler
    denoiser = Denoiser(job.pipe.unet, job.change)
    cutoff = job.arguments.get(
        "guidance_until"
    )  # turns of the loop before guidance is switched off
    step_arguments = _step_arguments(scheduler, job)
    end = job.arguments.get("denoising_end", 1.0)  # share of the training timesteps to go through
    for turn, (time, call) in enumerate(walk(scheduler, begin)):
        if time < round(1000 * (1 - end)):
            break
        if uncond is not None and (cutoff is None or turn < cutoff):
            call = replace(call, branches=BOTH)
            doubled = scheduler.scale_model_input(torch.cat([latents, latents]), time)
            text = torch.cat([uncond, cond])
            predicted = denoiser(
                call, doubled, time, encoder_hidden_states=text, added_cond_kwargs=extra
            )
            away, towards = predicted[: job.rows], predicted[job.rows :]
            predicted = away + job["guidance_scale"] * (towards - away)
        else:
            single = scheduler.scale_model_input(latents, time)
            predicted = denoiser(
                call, single, time, encoder_hidden_states=cond, added_cond_kwargs=extra
            )
        latents = scheduler.step(predicted, time, latents, **step_arguments).prev_sample
    return Trace(denoiser.calls, latents)


def _step_arguments(scheduler: Any, job: Job) -> dict[str, Any]:
    """Solvers that draw noise draw it from the rows' generators."""
    draws = (
        "DDIMScheduler DDPMScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler "
        "LCMScheduler DPMSolverMultistepScheduler KDPM2AncestralDiscreteScheduler"
    )
    return {"generator": job.generators} if type(scheduler).__name__ in draws.split() else {}
