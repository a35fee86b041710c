"""Hand-written loops of PixArt-Sigma, Sana, CogView4 and Lumina2."""

from dataclasses import replace

import numpy as np
import torch

from .job import Job, shift
from .timeline import walk
from .trace import Denoiser, Trace

BOTH = ("uncond", "cond")


def pixart_sigma(job: Job) -> Trace:
    return _cross_attention(job, factor=2)


def sana(job: Job) -> Trace:
    return _cross_attention(job, factor=4)


def _cross_attention(job: Job, factor: int) -> Trace:
    """PixArt-Sigma and Sana run the same loop; the first drops the predicted variance."""
    pipe, scheduler = job.pipe, job.pipe.scheduler
    cond, cond_mask, uncond, uncond_mask = pipe.encode_prompt(
        job.prompts,
        job.guided,
        negative_prompt="",
        num_images_per_prompt=job.images,
        max_sequence_length=job["max_sequence_length"],
    )
    scheduler.set_timesteps(job.steps)
    latents = job.noise(4, *job.latent_size(factor))
    denoiser = Denoiser(pipe.transformer, job.change)
    extra = {}
    if type(pipe).__name__ == "PixArtSigmaPipeline":
        extra["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    for time, call in walk(scheduler):
        if job.guided:
            predicted = denoiser(
                replace(call, branches=BOTH),
                torch.cat([latents, latents]),
                encoder_hidden_states=torch.cat([uncond, cond]),
                encoder_attention_mask=torch.cat([uncond_mask, cond_mask]),
                timestep=time.repeat(2 * job.rows),
                **extra,
            )
            away, towards = predicted[: job.rows], predicted[job.rows :]
            predicted = away + job["guidance_scale"] * (towards - away)
        else:
            predicted = denoiser(
                call,
                latents,
                encoder_hidden_states=cond,
                encoder_attention_mask=cond_mask,
                timestep=time.repeat(job.rows),
                **extra,
            )
        latents = scheduler.step(predicted[:, :4], time, latents).prev_sample
    return Trace(denoiser.calls, latents)


def cogview4(job: Job) -> Trace:
    pipe, scheduler = job.pipe, job.pipe.scheduler
    cond, uncond = pipe.encode_prompt(
        job.prompts, None, job.guided, num_images_per_prompt=job.images
    )
    height, width = job.latent_size(2)
    latents = job.noise(4, height, width)
    size = torch.tensor([[job["height"], job["width"]]], dtype=cond.dtype).repeat(job.rows, 1)
    # whole timesteps, evenly spaced; the levels are moved towards noise, the timesteps are not
    times = np.linspace(1000, 1, job.steps).astype(np.int64).astype(np.float32)
    config = scheduler.config
    tokens = (height // 2) * (width // 2)
    moved = config.base_shift + config.max_shift * (tokens / config.base_image_seq_len) ** 0.5
    scheduler.set_timesteps(timesteps=times, sigmas=times / 1000, mu=moved)
    denoiser = Denoiser(pipe.transformer, job.change)
    for time, call in walk(scheduler):
        shared = {
            "timestep": time.repeat(job.rows),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }
        call = replace(call, sigma=moved / (moved + 1 / call.sigma - 1))
        predicted = denoiser(call, latents, encoder_hidden_states=cond, **shared)
        if job.guided:
            away = denoiser(
                replace(call, branches=("uncond",)),
                latents,
                encoder_hidden_states=uncond,
                **shared,
            )
            predicted = away + job["guidance_scale"] * (predicted - away)
        latents = scheduler.step(predicted, time, latents).prev_sample
    return Trace(denoiser.calls, latents)


def lumina2(job: Job) -> Trace:
    pipe, scheduler = job.pipe, job.pipe.scheduler
    cond, cond_mask, uncond, uncond_mask = pipe.encode_prompt(
        job.prompts,
        job.guided,
        num_images_per_prompt=job.images,
        max_sequence_length=job["max_sequence_length"],
    )
    latents = job.noise(4, *job.latent_size(8))
    levels = np.linspace(1.0, 1 / job.steps, job.steps)
    # the pipeline takes the number of channels for the number of tokens
    scheduler.set_timesteps(sigmas=levels, mu=shift(scheduler, latents.shape[1]))
    scheduler.set_begin_index(0)
    denoiser = Denoiser(pipe.transformer, job.change)
    until = job.arguments.get("cfg_trunc_ratio", 1.0)
    for turn, (time, call) in enumerate(walk(scheduler)):
        towards_image = (1 - time / 1000).repeat(
            job.rows
        )  # the model counts from noise 0 to image 1
        predicted = denoiser(
            call,
            latents,
            timestep=towards_image,
            encoder_hidden_states=cond,
            encoder_attention_mask=cond_mask,
        )
        if job.guided and (turn + 1) / job.steps <= until:
            away = denoiser(
                replace(call, branches=("uncond",)),
                latents,
                timestep=towards_image,
                encoder_hidden_states=uncond,
                encoder_attention_mask=uncond_mask,
            )
            mixed = away + job["guidance_scale"] * (predicted - away)
            predicted = mixed * (
                predicted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
            )
        latents = scheduler.step(-predicted, time, latents).prev_sample
    return Trace(denoiser.calls, latents)
