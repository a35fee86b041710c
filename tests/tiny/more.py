"""More families with an image transformer, as components."""

from collections.abc import Callable
from typing import Any

from . import autoencoders, mmdit, text
from .weights import settle


def _flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _noise() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False)


def flux_channels(name: str, channels: int) -> Callable[[], dict[str, Any]]:
    """Flux with more input channels: a control picture, or a masked one and its mask."""

    def build() -> dict[str, Any]:
        from diffusers import FluxTransformer2DModel

        own = dict(mmdit.flux().components)
        config = {**own["transformer"].config, "in_channels": channels, "out_channels": 16}
        config.pop("_use_default_values", None)
        return {**own, "transformer": settle(FluxTransformer2DModel.from_config(config), name)}

    return build


def chroma() -> dict[str, Any]:
    from diffusers import ChromaTransformer2DModel

    tokenizer = text.t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return {
        "transformer": settle(transformer, "chroma-transformer"),
        "scheduler": _flow(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoders.kl("chroma-vae", shift=0.1),
        "text_encoder": text.t5_encoder(tokenizer, "chroma-text"),
        "tokenizer": tokenizer,
    }


def cogview3() -> dict[str, Any]:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusTransformer2DModel

    tokenizer = text.t5_tokenizer()
    transformer = CogView3PlusTransformer2DModel(
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
    )
    return {
        "transformer": settle(transformer, "cogview3-transformer"),
        "scheduler": CogVideoXDDIMScheduler(),
        "vae": autoencoders.kl("cogview3-vae"),
        "text_encoder": text.t5_encoder(tokenizer, "cogview3-text"),
        "tokenizer": tokenizer,
    }


def cogview4_control() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel

    from .parts import parts_of

    own = parts_of("cogview4")
    config = {**own["transformer"].config, "in_channels": 8}
    config.pop("_use_default_values", None)
    transformer = settle(CogView4Transformer2DModel.from_config(config), "cogview4-control")
    return {**own, "transformer": transformer}


def lumina() -> dict[str, Any]:
    from diffusers import LuminaNextDiT2DModel

    tokenizer = text.gemma_tokenizer()
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    return {
        "transformer": settle(transformer, "lumina-next"),
        "scheduler": _flow(),
        "vae": autoencoders.kl("lumina-vae", shift=0.1, widths=(4, 4, 8, 8)),
        "text_encoder": text.gemma_encoder(tokenizer, "lumina-text"),
        "tokenizer": tokenizer,
    }


def hunyuan_dit() -> dict[str, Any]:
    from diffusers import HunyuanDiT2DModel

    tokenizer, t5 = text.bert_tokenizer(), text.t5_tokenizer()
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        in_channels=4,
        patch_size=2,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        hidden_size=16,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=True,
    )
    return {
        "transformer": settle(transformer, "hunyuan-dit"),
        "scheduler": _noise(),
        "vae": autoencoders.kl("hunyuan-vae"),
        "text_encoder": text.bert_encoder(tokenizer, "hunyuan-text"),
        "tokenizer": tokenizer,
        "text_encoder_2": text.t5_encoder(t5, "hunyuan-text-2"),
        "tokenizer_2": t5,
    }


def pixart_alpha() -> dict[str, Any]:
    from .parts import parts_of

    return dict(parts_of("pixart-sigma"))


def z_image() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    tokenizer = text.chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    )
    return {
        "transformer": settle(transformer, "z-image"),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": autoencoders.kl("z-image-vae", shift=0.1),
        "text_encoder": text.qwen3_encoder(tokenizer, "z-image-text"),
        "tokenizer": tokenizer,
    }


def flux2() -> dict[str, Any]:
    from diffusers import Flux2Transformer2DModel

    tokenizer = text.chat_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return {
        "transformer": settle(transformer, "flux2"),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": autoencoders.flux2("flux2-vae"),
        "text_encoder": text.qwen3_encoder(tokenizer, "flux2-text", layers=28, causal=True),
        "tokenizer": tokenizer,
    }


def bria() -> dict[str, Any]:
    from diffusers import BriaTransformer2DModel

    tokenizer = text.t5_tokenizer()
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 12],
    )
    return {
        "transformer": settle(transformer, "bria"),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": autoencoders.kl("bria-vae", shift=0.1),
        "text_encoder": text.t5_encoder(tokenizer, "bria-text"),
        "tokenizer": tokenizer,
    }


def ovis() -> dict[str, Any]:
    from diffusers import OvisImageTransformer2DModel

    tokenizer = text.chat_tokenizer()
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        "transformer": settle(transformer, "ovis"),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": autoencoders.kl("ovis-vae", shift=0.1),
        "text_encoder": text.qwen3_encoder(tokenizer, "ovis-text"),
        "tokenizer": tokenizer,
    }


def kandinsky3() -> dict[str, Any]:
    from diffusers import DDPMScheduler, Kandinsky3UNet, VQModel

    tokenizer = text.t5_tokenizer()
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 32, 32),
        cross_attention_dim=32,
        encoder_hid_dim=32,
    )
    movq = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {
        "unet": settle(unet, "kandinsky3-unet"),
        "scheduler": DDPMScheduler(thresholding=False, clip_sample=False),
        "movq": settle(movq, "kandinsky3-movq"),
        "text_encoder": text.t5_encoder(tokenizer, "kandinsky3-text"),
        "tokenizer": tokenizer,
    }


def sana_sprint() -> dict[str, Any]:
    from diffusers import SanaTransformer2DModel, SCMScheduler

    from .parts import parts_of

    own = parts_of("sana")
    config = {
        **own["transformer"].config,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
    }
    config.pop("_use_default_values", None)
    return {
        **own,
        "transformer": settle(SanaTransformer2DModel.from_config(config), "sana-sprint"),
        "scheduler": SCMScheduler(),
    }


def kandinsky_prior() -> dict[str, Any]:
    from diffusers import PriorTransformer, UnCLIPScheduler
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tokenizer = text.clip_tokenizer()
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return {
        "prior": settle(prior, "kandinsky-prior"),
        "image_encoder": settle(CLIPVisionModelWithProjection(vision), "kandinsky-vision"),
        "text_encoder": text.clip_encoder(tokenizer, "kandinsky-text", projected=True),
        "tokenizer": tokenizer,
        "scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "flux-channels": flux_channels("flux-control-transformer", 32),
    "flux-fill": flux_channels("flux-fill-transformer", 48),
    "chroma": chroma,
    "cogview3": cogview3,
    "cogview4-control": cogview4_control,
    "lumina": lumina,
    "hunyuan-dit": hunyuan_dit,
    "pixart-alpha": pixart_alpha,
    "z-image": z_image,
    "flux2": flux2,
    "bria": bria,
    "ovis": ovis,
    "kandinsky3": kandinsky3,
    "sana-sprint": sana_sprint,
    "kandinsky-prior": kandinsky_prior,
}
