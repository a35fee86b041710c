"""Where the tokens of the prompt are among the text tokens that a denoiser gets."""

from typing import Any

from dreamreader.engine.families.classes import entry_of
from dreamreader.engine.families.places import Layout
from dreamreader.engine.subject import innermost

Source = tuple[str, int, bool]
"""(text encoder, number of its first token in the denoiser's text, padding is taken out first)"""


def text_sources(pipe: Any, layout: Layout | None) -> list[Source]:
    """The text encoders whose tokens the denoiser gets, and where it has them.

    Stable Diffusion 3 puts the tokens of its CLIP encoders first and those of T5 behind them; Flux
    uses T5 alone; QwenImage drops the tokens of its template; AuraFlow puts registers in front.
    """
    transformer = getattr(pipe, "transformer", None)
    family = None
    if transformer is not None:
        family = entry_of(type(innermost(transformer)), _SOURCES, "forward")
    if family is not None:
        return family(pipe)
    if getattr(pipe, "text_encoder", None) is None:
        return [("text_encoder_2", 0, False)]
    return [("text_encoder", layout.text_offset if layout is not None else 0, False)]


def _clip_then_t5(pipe: Any) -> list[Source]:
    clip = int(getattr(pipe, "tokenizer_max_length", 77))
    return [("text_encoder", 0, False), ("text_encoder_3", clip, False)]


def _second(pipe: Any) -> list[Source]:
    return [("text_encoder_2", 0, False)]


def _after_template(pipe: Any) -> list[Source]:
    return [("text_encoder", -int(getattr(pipe, "prompt_template_encode_start_idx", 0)), True)]


_SOURCES = {
    "SD3Transformer2DModel": _clip_then_t5,
    "FluxTransformer2DModel": _second,
    "QwenImageTransformer2DModel": _after_template,
}
