"""Autoencoders of the tiny pipelines: factor 2 (Sana 4, Lumina2 8), four latent channels."""

from typing import Any

from .weights import settle


def kl(name: str, shift: float | None = None, widths: tuple[int, ...] = (8, 8)) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
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
