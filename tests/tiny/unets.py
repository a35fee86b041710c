"""Tiny StableDiffusion and StableDiffusionXL."""

from typing import Any

from . import autoencoders, text
from .weights import settle


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = text.clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=autoencoders.kl("sd-vae"),
        text_encoder=text.clip_encoder(tokenizer, "sd-text"),
        tokenizer=tokenizer,
        unet=settle(unet, "sd-unet"),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = text.clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,  # both text encoders side by side
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoders.kl("sdxl-vae"),
        text_encoder=text.clip_encoder(tokenizer, "sdxl-text"),
        text_encoder_2=text.clip_encoder(tokenizer, "sdxl-text-2", projected=True),
        tokenizer=tokenizer,
        tokenizer_2=text.clip_tokenizer(),
        unet=settle(unet, "sdxl-unet"),
        scheduler=_scheduler(),
        add_watermarker=False,
    )


def stable_diffusion_img2img() -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(
        **stable_diffusion().components, requires_safety_checker=False
    )


def stable_diffusion_xl_img2img() -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(
        **stable_diffusion_xl().components, add_watermarker=False
    )
