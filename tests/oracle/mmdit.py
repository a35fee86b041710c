"""Hand-written loops of StableDiffusion3, Flux, QwenImage and AuraFlow."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .job import Job, pack, shift
from .timeline import walk
from .trace import Denoiser, Trace

BOTH = ("uncond", "cond")


def stable_diffusion_3(job: Job) -> Trace:
    pipe, scheduler = job.pipe, job.pipe.scheduler
    cond, uncond, pooled, pooled_uncond = pipe.encode_prompt(
        job.prompts,
        None,
        None,
        num_images_per_prompt=job.images,
        do_classifier_free_guidance=job.guided,
        max_sequence_length=job["max_sequence_length"],
    )
    latents = job.noise(4, *job.latent_size(2))
    scheduler.set_timesteps(job.steps)
    skipped = job.arguments.get("skip_guidance_layers")
    denoiser = Denoiser(pipe.transformer, job.change)
    for turn, (time, call) in enumerate(walk(scheduler)):
        if job.guided:
            predicted = denoiser(
                replace(call, branches=BOTH),
                torch.cat([latents, latents]),
                encoder_hidden_states=torch.cat([uncond, cond]),
                pooled_projections=torch.cat([pooled_uncond, pooled]),
                timestep=time.repeat(2 * job.rows),
            )
            away, towards = predicted[: job.rows], predicted[job.rows :]
            predicted = away + job["guidance_scale"] * (towards - away)
            if skipped is not None and job.steps * 0.01 < turn < job.steps * 0.2:
                without = denoiser(
                    replace(call, branches=("cond_skip",)),
                    latents,
                    encoder_hidden_states=cond,
                    pooled_projections=pooled,
                    timestep=time.repeat(job.rows),
                    skip_layers=skipped,
                )
                predicted = predicted + (towards - without) * 2.8
        else:
            predicted = denoiser(
                call,
                latents,
                encoder_hidden_states=cond,
                pooled_projections=pooled,
                timestep=time.repeat(job.rows),
            )
        latents = scheduler.step(predicted, time, latents).prev_sample
    return Trace(denoiser.calls, latents)


def flux(job: Job) -> Trace:
    height, width = job.latent_size(2)
    latents = pack(job.noise(4, height, width))
    _flux_times(job, latents)
    job.pipe.scheduler.set_begin_index(0)
    return _flux_denoise(job, latents, height, width)


def flux_img2img(job: Job) -> Trace:
    """The picture's latents blended with noise; the loop starts part of the way down."""
    pipe, scheduler = job.pipe, job.pipe.scheduler
    height, width = job.latent_size(2)
    tokens = (height // 2) * (width // 2)
    _flux_times(job, torch.empty(1, tokens, 1))
    skipped = int(max(job.steps - min(job.steps * job["strength"], job.steps), 0))
    begin = skipped * scheduler.order
    scheduler.set_begin_index(begin)
    pixels = 2 * job["image"] - 1
    clean = torch.cat(
        [
            pipe.vae.encode(pixels[row : row + 1]).latent_dist.sample(generator=generator)
            for row, generator in enumerate(job.generators)
        ]
    )
    clean = (clean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    level = scheduler.timesteps[begin] / 1000
    latents = level * job.noise(4, height, width) + (1.0 - level) * clean
    return _flux_denoise(job, pack(latents), height, width, begin)


def _flux_times(job: Job, latents: Tensor) -> None:
    scheduler = job.pipe.scheduler
    if type(scheduler).__name__ == "FlowMatchHeunDiscreteScheduler":
        scheduler.set_timesteps(job.steps)
        return
    levels = np.linspace(1.0, 1 / job.steps, job.steps)
    scheduler.set_timesteps(sigmas=levels, mu=shift(scheduler, latents.shape[1]))


def _flux_denoise(job: Job, latents: Tensor, height: int, width: int, begin: int = 0) -> Trace:
    pipe, scheduler = job.pipe, job.pipe.scheduler
    true_scale = job.arguments.get("true_cfg_scale", 1.0)
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1] = torch.arange(height // 2)[:, None]
    places[..., 2] = torch.arange(width // 2)[None, :]
    shared: dict[str, Any] = {"img_ids": places.view(-1, 3), "guidance": None}
    if pipe.transformer.config.guidance_embeds:
        shared["guidance"] = torch.full([job.rows], job["guidance_scale"])
    cond = _flux_text(job, job.prompts)
    uncond = _flux_text(job, job.negative()) if true_scale > 1 else None
    denoiser = Denoiser(pipe.transformer, job.change)
    for time, call in walk(scheduler, begin):
        shared["timestep"] = time.repeat(job.rows).to(latents.dtype) / 1000
        predicted = denoiser(call, latents, **cond, **shared)
        if uncond is not None:
            away = denoiser(replace(call, branches=("uncond",)), latents, **uncond, **shared)
            predicted = away + true_scale * (predicted - away)
        latents = scheduler.step(predicted, time, latents).prev_sample
    return Trace(denoiser.calls, latents)


def _flux_text(job: Job, prompts: list[str]) -> dict[str, Tensor]:
    embeds, pooled, places = job.pipe.encode_prompt(
        prompts,
        prompts,
        num_images_per_prompt=job.images,
        max_sequence_length=job["max_sequence_length"],
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": places}


def qwen_image(job: Job) -> Trace:
    pipe, scheduler = job.pipe, job.pipe.scheduler
    height, width = job.latent_size(2)
    guided = job["true_cfg_scale"] > 1
    cond, cond_mask = pipe.encode_prompt(job.prompts, num_images_per_prompt=job.images)
    uncond, uncond_mask = pipe.encode_prompt(job.negative(), num_images_per_prompt=job.images)
    latents = pack(job.noise(4, height, width))
    levels = np.linspace(1.0, 1 / job.steps, job.steps)
    scheduler.set_timesteps(sigmas=levels, mu=shift(scheduler, latents.shape[1]))
    scheduler.set_begin_index(0)
    shapes = [[(1, height // 2, width // 2)]] * len(job.prompts)
    denoiser = Denoiser(pipe.transformer, job.change)
    for time, call in walk(scheduler):
        level = time.repeat(job.rows).to(latents.dtype) / 1000
        shared = {"timestep": level, "img_shapes": shapes}
        predicted = denoiser(
            call,
            latents,
            encoder_hidden_states=cond,
            encoder_hidden_states_mask=cond_mask,
            **shared,
        )
        if guided:
            away = denoiser(
                replace(call, branches=("uncond",)),
                latents,
                encoder_hidden_states=uncond,
                encoder_hidden_states_mask=uncond_mask,
                **shared,
            )
            mixed = away + job["true_cfg_scale"] * (predicted - away)
            # each token keeps the norm that it has without guidance
            predicted = mixed * (
                predicted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
            )
        latents = scheduler.step(predicted, time, latents).prev_sample
    return Trace(denoiser.calls, latents)


def aura_flow(job: Job) -> Trace:
    pipe, scheduler = job.pipe, job.pipe.scheduler
    cond, _, uncond, _ = pipe.encode_prompt(
        job.prompts,
        None,
        job.guided,
        job.images,
        max_sequence_length=job["max_sequence_length"],
    )
    scheduler.set_timesteps(job.steps)
    scheduler.set_begin_index(0)
    latents = job.noise(4, *job.latent_size(2))
    denoiser = Denoiser(pipe.transformer, job.change)
    for time, call in walk(scheduler):
        level = torch.tensor([float(time) / 1000]).to(latents.dtype)
        if job.guided:
            predicted = denoiser(
                replace(call, branches=BOTH),
                torch.cat([latents, latents]),
                encoder_hidden_states=torch.cat([uncond, cond]),
                timestep=level.repeat(2 * job.rows),
            )
            away, towards = predicted[: job.rows], predicted[job.rows :]
            predicted = away + job["guidance_scale"] * (towards - away)
        else:
            predicted = denoiser(
                call, latents, encoder_hidden_states=cond, timestep=level.repeat(job.rows)
            )
        latents = scheduler.step(predicted, time, latents).prev_sample
    return Trace(denoiser.calls, latents)
