"""Autoencoders of the tiny pipelines: factor 2 (Sana 4, Lumina2 8), four latent channels."""

from typing import Any

from .weights import settle


def kl(
    name: str, shift: float | None = None, widths: tuple[int, ...] = (8, 8), latents: int = 4
) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=latents,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=shift,
        force_upcast=False,
    )
    return settle(vae, name)


def dc(name: str) -> Any:
    from diffusers import AutoencoderDC

    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (3,)),
        decoder_qkv_multiscales=((), (), (3,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        scaling_factor=0.5,
    )
    return settle(vae, name)


def qwen(name: str) -> Any:
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.0, 1.5, 1.2, 2.5],
    )
    return settle(vae, name)


def flux2(name: str) -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return settle(vae, name)


def wan(name: str) -> Any:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.0, 1.5, 1.2, 2.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return settle(vae, name)


def ltx(name: str) -> Any:
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=4,
    )
    vae = settle(vae, name)
    vae.latents_mean.copy_(vae.latents_mean + 0.1)
    return vae


def cogvideo(name: str) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return settle(vae, name)


def mochi(name: str) -> Any:
    from diffusers import AutoencoderKLMochi

    vae = AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.1, 1.2, 1.3],
    )
    return settle(vae, name)


def allegro(name: str) -> Any:
    from diffusers import AutoencoderKLAllegro

    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return settle(vae, name)


def hunyuan_video(name: str) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return settle(vae, name)
