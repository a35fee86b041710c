"""Tiny pipelines with cross-attention or one stream: PixArt-Sigma, Sana, CogView4, Lumina2."""

from typing import Any

from . import autoencoders, text
from .weights import settle


def pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer = text.t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # mean and a variance that the pipeline drops
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
        norm_num_groups=4,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text.t5_encoder(tokenizer, "pixart-text"),
        vae=autoencoders.kl("pixart-vae"),
        transformer=settle(transformer, "pixart-transformer"),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
    )


def sana() -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer = text.gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text.gemma_encoder(tokenizer, "sana-text"),
        vae=autoencoders.dc("sana-vae"),
        transformer=settle(transformer, "sana-transformer"),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def cogview4() -> Any:
    from diffusers import (
        CogView4Pipeline,
        CogView4Transformer2DModel,
        FlowMatchEulerDiscreteScheduler,
    )

    tokenizer = text.byte_tokenizer(prefixed=True)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=32,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text.glm_encoder(tokenizer, "cogview-text"),
        vae=autoencoders.kl("cogview-vae"),
        transformer=settle(transformer, "cogview-transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


def lumina2() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Lumina2Pipeline,
        Lumina2Transformer2DModel,
    )

    tokenizer = text.gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(320, 32, 32),
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(
        transformer=settle(transformer, "lumina-transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        # the pipeline assumes a factor of 8
        vae=autoencoders.kl("lumina-vae", shift=0.1, widths=(4, 4, 8, 8)),
        text_encoder=text.gemma_encoder(tokenizer, "lumina-text"),
        tokenizer=tokenizer,
    )
