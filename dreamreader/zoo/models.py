"""The embedded models, untrained: real diffusers and transformers classes of a laptop's size.

All share one AutoencoderKL (64 x 64 pictures, 16 x 16 x 4 latents) and one caption tokenizer.
"""

import functools
import itertools
from typing import Any

import torch

from dreamreader.zoo import scenes

CAPTION_TOKENS = 28  # the longest caption has 24 words
NAMES = ("shapes-unet", "shapes-unet-b", "shapes-dit")
UNET_WIDTHS = {"shapes-unet": (48, 96, 96, 96), "shapes-unet-b": (40, 80, 80, 96)}
TEXT_WIDTH = {"shapes-unet": 128, "shapes-unet-b": 96, "shapes-dit": 96}
SEEDS = {"shapes-vae": 10, "shapes-unet": 11, "shapes-unet-b": 12, "shapes-dit": 13}
LATENT_SIDE = 16


def vocabulary() -> list[str]:
    """Every word that a caption can contain, in a fixed order."""
    words = "a an at the and on with frame background".split()
    for group in (
        scenes.COLORS,
        scenes.SHAPES,
        scenes.SIZES,
        scenes.ROWS,
        scenes.COLUMNS,
        scenes.BACKGROUNDS,
    ):
        words += [w for w in group if w not in words]
    return words


def build_tokenizer() -> Any:
    """A CLIPTokenizer: each caption word is one token, any other word falls apart into letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    pieces = dict.fromkeys(letters + [c + "</w>" for c in letters])
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        parts = _merge_parts([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # earlier words keep their token: their own merges come first
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            pieces.setdefault(parts[0])
    tokens = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    vocabulary_ids = {piece: place for place, piece in enumerate(tokens)}
    build: Any = CLIPTokenizer
    return build(vocab=vocabulary_ids, merges=merges, model_max_length=CAPTION_TOKENS)


def _merge_parts(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """The parts of a word after the merges, applied in their order as byte-pair encoding does."""
    rank = {pair: place for place, pair in enumerate(merges)}
    while pairs := [p for p in itertools.pairwise(parts) if p in rank]:
        at = list(itertools.pairwise(parts)).index(min(pairs, key=lambda pair: rank[pair]))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def build_text_encoder(width: int, tokenizer: Any, projected: bool = False) -> Any:
    """A CLIP text model of three layers; `projected` adds the projection of the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_TOKENS,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": scenes.SIZE_PX,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,  # StableDiffusionPipeline does not apply one
    }
    return AutoencoderKL(**config)


def build_unet(name: str) -> Any:
    """Cross-attention at 8 x 8, 4 x 4 and 2 x 2 (middle block); four heads everywhere.

    At 2 x 2 the zeros around the map tell every cell where it is, so that places can be learned.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        block_out_channels=UNET_WIDTHS[name],
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH[name],
        attention_head_dim=4,  # diffusers reads this number as the count of heads
        norm_num_groups=8,
    )


def build_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH["shapes-dit"],
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH["shapes-dit"],
        pos_embed_max_size=LATENT_SIDE,
    )


def build_parts(name: str) -> dict[str, Any]:
    """Untrained parts of one model by pipeline name, without the autoencoder; seeded."""
    torch.manual_seed(SEEDS[name])
    tokenizer = build_tokenizer()
    if name != "shapes-dit":
        encoder = build_text_encoder(TEXT_WIDTH[name], tokenizer)
        return {"tokenizer": tokenizer, "text_encoder": encoder, "unet": build_unet(name)}
    encoders = [build_text_encoder(TEXT_WIDTH[name], tokenizer, projected=True) for _ in range(2)]
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": build_tokenizer(),
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "transformer": build_transformer(),
    }


def build_scheduler(name: str) -> Any:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if name == "shapes-dit":
        return FlowMatchEulerDiscreteScheduler(shift=2.0)
    return DDIMScheduler(
        beta_schedule="linear",  # the last step holds no trace of the picture: captions place it
        beta_start=0.0001,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def assemble(name: str, parts: dict[str, Any], vae: Any) -> Any:
    """The diffusers pipeline of one model from its parts."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

    absent = ("text_encoder_3", "tokenizer_3")
    build: Any = StableDiffusion3Pipeline
    if name != "shapes-dit":
        absent = ("safety_checker", "feature_extractor")
        build = functools.partial(StableDiffusionPipeline, requires_safety_checker=False)
    return build(**parts, **dict.fromkeys(absent), vae=vae, scheduler=build_scheduler(name))
