"""Families that make videos, as components."""

from collections.abc import Callable
from typing import Any

from . import autoencoders, text, unets
from .weights import settle


def _flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _t5(name: str, multilingual: bool = False) -> dict[str, Any]:
    tokenizer = text.t5_tokenizer()
    encoder = text.t5_encoder(tokenizer, f"{name}-text", multilingual=multilingual)
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def wan(name: str = "wan", channels: int = 4, **config: Any) -> dict[str, Any]:
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **config,
    )
    return {
        **_t5(name, multilingual=True),
        "transformer": settle(transformer, f"{name}-transformer"),
        "scheduler": _flow(shift=3.0),
        "vae": autoencoders.wan("wan-vae"),
    }


def wan_image() -> dict[str, Any]:
    """Latents, a first frame and its mask (2 frames of a chunk) side by side."""
    return wan("wan-image", 4 + 4 + 2)


def skyreels(name: str = "skyreels", channels: int = 4) -> dict[str, Any]:
    from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return {
        **_t5(name, multilingual=True),
        "transformer": settle(transformer, f"{name}-transformer"),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": autoencoders.wan("wan-vae"),
    }


def ltx() -> dict[str, Any]:
    from diffusers import LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=32,
    )
    return {
        **_t5("ltx"),
        "transformer": settle(transformer, "ltx-transformer"),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": autoencoders.ltx("ltx-vae"),
    }


def ltx_unshifted() -> dict[str, Any]:
    return {**ltx(), "scheduler": _flow()}


def cogvideo(name: str = "cogvideo", channels: int = 4) -> dict[str, Any]:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    return {
        **_t5(name),
        "transformer": settle(transformer, f"{name}-transformer"),
        "scheduler": CogVideoXDDIMScheduler(),
        "vae": autoencoders.cogvideo("cogvideo-vae"),
    }


def cogvideo_image() -> dict[str, Any]:
    return cogvideo("cogvideo-image", 8)


def mochi() -> dict[str, Any]:
    from diffusers import MochiTransformer3DModel

    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    return {
        **_t5("mochi"),
        "transformer": settle(transformer, "mochi-transformer"),
        "scheduler": _flow(invert_sigmas=True),
        "vae": autoencoders.mochi("mochi-vae"),
    }


def latte() -> dict[str, Any]:
    from diffusers import DDIMScheduler, LatteTransformer3DModel

    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    return {
        **_t5("latte"),
        "transformer": settle(transformer, "latte-transformer"),
        "scheduler": DDIMScheduler(clip_sample=False),
        "vae": autoencoders.kl("latte-vae"),
    }


def allegro() -> dict[str, Any]:
    from diffusers import AllegroTransformer3DModel, DDIMScheduler

    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=2,
        sample_frames=8,
        caption_channels=32,
    )
    return {
        **_t5("allegro"),
        "transformer": settle(transformer, "allegro-transformer"),
        "scheduler": DDIMScheduler(clip_sample=False),
        "vae": autoencoders.allegro("allegro-vae"),
    }


def hunyuan_video() -> dict[str, Any]:
    from diffusers import HunyuanVideoTransformer3DModel

    tokenizer, clip = text.byte_tokenizer(prefixed=True), text.clip_tokenizer()
    tokenizer.padding_side = "right"
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    return {
        "text_encoder": text.llama_encoder(tokenizer, "hunyuan-video-text"),
        "tokenizer": tokenizer,
        "text_encoder_2": text.clip_encoder(clip, "hunyuan-video-text-2"),
        "tokenizer_2": clip,
        "transformer": settle(transformer, "hunyuan-video-transformer"),
        "scheduler": _flow(shift=7.0),
        "vae": autoencoders.hunyuan_video("hunyuan-video-vae"),
    }


def animate() -> dict[str, Any]:
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    own = dict(unets.stable_diffusion().components)
    return {**own, "motion_adapter": settle(adapter, "motion-adapter")}


def animate_xl() -> dict[str, Any]:
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    own = dict(unets.stable_diffusion_xl().components)
    return {**own, "motion_adapter": settle(adapter, "motion-adapter-xl")}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "wan": wan,
    "wan-image": wan_image,
    "skyreels": skyreels,
    "ltx": ltx,
    "ltx-unshifted": ltx_unshifted,
    "cogvideo": cogvideo,
    "cogvideo-image": cogvideo_image,
    "mochi": mochi,
    "latte": latte,
    "allegro": allegro,
    "hunyuan-video": hunyuan_video,
    "animate": animate,
    "animate-xl": animate_xl,
}
