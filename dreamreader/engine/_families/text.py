"""Where the tokens of the prompt are among the text tokens that a denoiser gets."""

from typing import Any

from dreamreader.engine._clock_run import own_class
from dreamreader.engine._families.classes import entry_of
from dreamreader.engine._families.places import StreamLayout
from dreamreader.engine._subject import innermost
from dreamreader.errors import ClockUnknown

Source = tuple[tuple[str, ...], int, bool]
"""(text encoders whose features stand side by side, number of their first token in the denoiser's
text, padding is taken out or cut off first)"""


def text_sources(pipe: Any, layout: StreamLayout | None) -> list[Source]:
    """The text encoders whose tokens the denoiser gets, and where it has them.

    Of a pipeline with several text encoders this is known for the families below.

    Raises:
        ClockUnknown: it is not known for this one.
    """
    own = [name for name in ("transformer", "unet") if getattr(pipe, name, None) is not None]
    if own:
        denoiser = type(innermost(getattr(pipe, own[0])))
        if family := entry_of(denoiser, _SOURCES, "forward"):
            return family(pipe)
    encoders = _present(pipe, *(f"text_encoder{n}" for n in ("", "_2", "_3", "_4")))
    if len(encoders) > 1:
        raise ClockUnknown(
            f"which tokens of its text encoders ({', '.join(encoders)}) the denoiser of "
            f"{own_class(pipe).__name__} gets, and where, is not known: give token numbers"
        )
    return [(encoders, layout.text_offset if layout is not None else 0, False)]


def _present(pipe: Any, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if getattr(pipe, name, None) is not None)


def _side_by_side(pipe: Any) -> list[Source]:
    """Stable Diffusion XL joins the features of both encoders."""
    return [(_present(pipe, "text_encoder", "text_encoder_2"), 0, False)]


def _clip_then_t5(pipe: Any) -> list[Source]:
    """Stable Diffusion 3 puts the tokens of its CLIP encoders first, those of T5 behind them."""
    clip = _require_number(pipe, "tokenizer_max_length")
    return [*_side_by_side(pipe), (_present(pipe, "text_encoder_3"), clip, False)]


def _second(pipe: Any) -> list[Source]:
    return [(("text_encoder_2",), 0, False)]


def _after_template(pipe: Any) -> list[Source]:
    return [(("text_encoder",), -_require_number(pipe, "prompt_template_encode_start_idx"), True)]


def _require_number(pipe: Any, name: str) -> int:
    number = getattr(pipe, name, None)
    if not isinstance(number, int):
        raise ClockUnknown(
            f"{own_class(pipe).__name__} has no {name}, which says where the words of the prompt "
            "are among the text tokens of its denoiser: give token numbers"
        )
    return number


def _cut_behind_longest(pipe: Any) -> list[Source]:
    """Kandinsky 3 cuts the padding off behind the longest prompt."""
    return [(("text_encoder",), 0, True)]


_SOURCES = {
    "UNet2DConditionModel": _side_by_side,
    "UNetMotionModel": _side_by_side,
    "SD3Transformer2DModel": _clip_then_t5,
    "FluxTransformer2DModel": _second,
    "QwenImageTransformer2DModel": _after_template,
    "Kandinsky3UNet": _cut_behind_longest,
}
