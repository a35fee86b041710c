"""Where the tokens of the prompt are among the text tokens that a denoiser gets."""

from typing import Any

from dreamreader.engine.families.places import Layout


def text_sources(pipe: Any, layout: Layout | None) -> list[tuple[str, int, bool]]:
    """(text encoder, number of its first token in the denoiser's text, padding is taken out first).

    Stable Diffusion 3 puts the tokens of its CLIP encoders first and those of T5 behind them; Flux
    uses T5 alone; QwenImage drops the tokens of its template; AuraFlow puts registers in front.
    """
    name = type(getattr(pipe, "transformer", None)).__name__
    if name == "SD3Transformer2DModel":
        clip = int(getattr(pipe, "tokenizer_max_length", 77))
        return [("text_encoder", 0, False), ("text_encoder_3", clip, False)]
    if name == "FluxTransformer2DModel":
        return [("text_encoder_2", 0, False)]
    if name == "QwenImageTransformer2DModel":
        return [("text_encoder", -int(getattr(pipe, "prompt_template_encode_start_idx", 0)), True)]
    if getattr(pipe, "text_encoder", None) is None:
        return [("text_encoder_2", 0, False)]
    return [("text_encoder", layout.text_offset if layout is not None else 0, False)]
