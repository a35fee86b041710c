"""What each family of denoisers is given as its `timestep` argument.

A scheduler counts time in training timesteps (1000 or 999 at pure noise). Most denoisers take that
number; the families listed here take a function of it. One line per family; a class that is not
listed is `None`, and the clock then accepts any of the known forms as a cross-check, but never
reads the step from them.
"""

from collections.abc import Callable
from typing import Any

Form = Callable[[float, float, Any], float]
"""(scheduler timestep, number of training timesteps, config of the denoiser) -> argument."""


def raw(timestep: float, train: float, config: Any) -> float:
    """The scheduler's own value."""
    return timestep


def thousandth(timestep: float, train: float, config: Any) -> float:
    """t / 1000, whatever the number of training timesteps."""
    return timestep / 1000.0


def rising(timestep: float, train: float, config: Any) -> float:
    """1 - t / T: runs from 0 at pure noise to 1."""
    return 1.0 - timestep / train


def scaled(timestep: float, train: float, config: Any) -> float:
    """t times the `timestep_scale` of the denoiser's config."""
    return timestep * getattr(config, "timestep_scale", 1.0)


KNOWN_FORMS: tuple[Form, ...] = (raw, thousandth, rising)

_FORMS: dict[str, Form] = {
    "UNet2DConditionModel": raw,
    "UNet2DModel": raw,
    "UNet3DConditionModel": raw,
    "UNetMotionModel": raw,
    "SD3Transformer2DModel": raw,
    "PixArtTransformer2DModel": raw,
    "HunyuanDiT2DModel": raw,
    "CogView3PlusTransformer2DModel": raw,
    "CogView4Transformer2DModel": raw,
    "CogVideoXTransformer3DModel": raw,
    "LTXVideoTransformer3DModel": raw,
    "LatteTransformer3DModel": raw,
    "AllegroTransformer3DModel": raw,
    "WanTransformer3DModel": raw,
    "SkyReelsV2Transformer3DModel": raw,
    "HunyuanVideoTransformer3DModel": raw,
    "SanaTransformer2DModel": scaled,
    "AuraFlowTransformer2DModel": thousandth,
    "FluxTransformer2DModel": thousandth,
    "Flux2Transformer2DModel": thousandth,
    "ChromaTransformer2DModel": thousandth,
    "QwenImageTransformer2DModel": thousandth,
    "OvisImageTransformer2DModel": thousandth,
    "LongCatImageTransformer2DModel": thousandth,
    "Lumina2Transformer2DModel": rising,
    "LuminaNextDiT2DModel": rising,
    "ZImageTransformer2DModel": rising,
}


def form_of(denoiser: type) -> Form | None:
    """The form that denoisers of this class, or of the class it derives from, are called with."""
    for base in denoiser.__mro__:
        if base.__name__ in _FORMS:
            return _FORMS[base.__name__]
    return None
