"""Tiny StableDiffusion and StableDiffusionXL."""

from collections.abc import Callable
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


def stable_diffusion_xl(widths: tuple[int, int] = (16, 32)) -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = text.clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=widths,
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


def _unet(name: str, channels: int, family: Callable[[], Any], **config: Any) -> dict[str, Any]:
    """The components of a pipeline with a UNet that takes more channels, or more conditions."""
    from diffusers import UNet2DConditionModel

    own = dict(family().components)
    changed = {**own["unet"].config, "in_channels": channels, **config}
    changed.pop("_use_default_values", None)  # names that would be taken from the class again
    return {**own, "unet": settle(UNet2DConditionModel.from_config(changed), name)}


def pix2pix() -> dict[str, Any]:
    return _unet("pix2pix-unet", 8, stable_diffusion)


def pix2pix_xl() -> dict[str, Any]:
    return _unet("pix2pix-xl-unet", 8, stable_diffusion_xl)


def wide() -> dict[str, Any]:
    """The first width that ControlNetUnion has in its code."""
    return dict(stable_diffusion_xl((320, 32)).components)


def consistency() -> dict[str, Any]:
    from diffusers import LCMScheduler

    own = _unet("lcm-unet", 4, stable_diffusion, time_cond_proj_dim=8)
    return {**own, "scheduler": LCMScheduler.from_config(own["scheduler"].config)}


def upscale() -> dict[str, Any]:
    own = _unet("upscale-unet", 7, stable_diffusion, num_class_embeds=1000)
    return {**own, "low_res_scheduler": _scheduler()}


def deepfloyd() -> dict[str, Any]:
    """IF: pixels instead of latents, a T5 text encoder, a learned variance."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    tokenizer = text.t5_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=4,
        act_fn="gelu",
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text.t5_encoder(tokenizer, "if-text"),
        "unet": settle(unet, "if-unet"),
        "scheduler": DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=False
        ),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "pix2pix": pix2pix,
    "pix2pix-xl": pix2pix_xl,
    "sdxl-320": wide,
    "lcm": consistency,
    "upscale": upscale,
    "deepfloyd": deepfloyd,
}
