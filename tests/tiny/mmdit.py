"""Tiny pipelines that join the text and image streams: SD3, Flux, QwenImage, AuraFlow."""

from collections.abc import Callable
from typing import Any

from . import autoencoders, text
from .weights import settle


def _flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def stable_diffusion_3(channels: int = 4) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=settle(transformer, "sd3-transformer"),
        scheduler=_flow(shift=3.0),
        vae=autoencoders.kl("sd3-vae", shift=0.06, latents=channels),
        text_encoder=text.clip_encoder(clip, "sd3-text", projected=True),
        tokenizer=clip,
        text_encoder_2=text.clip_encoder(clip, "sd3-text-2", projected=True),
        tokenizer_2=text.clip_tokenizer(),
        text_encoder_3=text.t5_encoder(t5, "sd3-text-3"),
        tokenizer_3=t5,
    )


def _flux(distilled: bool) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=settle(transformer, "flux-transformer"),
        scheduler=_flow(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoders.kl("flux-vae", shift=0.1),
        text_encoder=text.clip_encoder(clip, "flux-text"),
        tokenizer=clip,
        text_encoder_2=text.t5_encoder(t5, "flux-text-2"),
        tokenizer_2=t5,
    )


def flux() -> Any:
    return _flux(distilled=True)


def flux_true_cfg() -> Any:
    return _flux(distilled=False)


def flux_img2img() -> Any:
    from diffusers import FluxImg2ImgPipeline

    return FluxImg2ImgPipeline(**_flux(distilled=True).components)


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer = text.qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return QwenImagePipeline(
        transformer=settle(transformer, "qwen-transformer"),
        scheduler=_flow(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=autoencoders.qwen("qwen-vae"),
        text_encoder=text.qwen_vl_encoder(tokenizer, "qwen-text"),
        tokenizer=tokenizer,
    )


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    tokenizer = text.t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text.t5_encoder(tokenizer, "aura-text", multilingual=True),
        vae=autoencoders.kl("aura-vae"),
        transformer=settle(transformer, "aura-transformer"),
        scheduler=_flow(shift=1.73),
    )


def _sixteen() -> dict[str, Any]:
    """Sixteen latent channels, which the inpainting class asks for."""
    return dict(stable_diffusion_3(16).components)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"sd3-16": _sixteen}
