"""What each family of denoisers is given as its `timestep` argument.

A scheduler counts time in training timesteps (1000 or 999 at pure noise). Most denoisers take that
number; the families listed here take a function of it. One line per family; a class that is not
listed is `None`, and the clock then accepts any of the known forms as a cross-check, but never
reads the step from them.
"""

import math
from collections.abc import Callable
from typing import Any

from dreamreader.engine._families.classes import entry_of

Form = Callable[[float, float, Any], float]
"""(scheduler timestep, number of training timesteps, config of the denoiser) -> argument."""


def raw(timestep: float, train: float, config: Any) -> float:
    """The scheduler's own value."""
    return timestep


def thousandth(timestep: float, train: float, config: Any) -> float:
    """t / 1000, whatever the number of training timesteps."""
    return timestep / 1000.0


def invert(timestep: float, train: float, config: Any) -> float:
    """1 - t / T: runs from 0 at pure noise to 1."""
    return 1.0 - timestep / train


def scale(timestep: float, train: float, config: Any) -> float:
    """t times the `timestep_scale` of the denoiser's config."""
    return timestep * getattr(config, "timestep_scale", 1.0)


def trigonometric(timestep: float, train: float, config: Any) -> float:
    """sin t / (sin t + cos t) of an angle: 1 at pure noise."""
    return math.sin(timestep) / (math.sin(timestep) + math.cos(timestep))


KNOWN_FORMS: tuple[Form, ...] = (raw, thousandth, invert)

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
    "MochiTransformer3DModel": raw,
    "PriorTransformer": raw,
    "Kandinsky3UNet": raw,
    "StableCascadeUNet": raw,
    "WuerstchenPrior": raw,
    "WuerstchenDiffNeXt": raw,
    "UNetSpatioTemporalConditionModel": raw,
    "SanaTransformer2DModel": scale,
    "SanaControlNetModel": scale,
    "ControlNetModel": raw,
    "ControlNetUnionModel": raw,
    "MultiControlNetModel": raw,
    "MultiControlNetUnionModel": raw,
    "SparseControlNetModel": raw,
    "HunyuanDiT2DControlNetModel": raw,
    "HunyuanDiT2DMultiControlNetModel": raw,
    "SD3ControlNetModel": raw,
    "SD3MultiControlNetModel": raw,
    "FluxControlNetModel": thousandth,
    "FluxMultiControlNetModel": thousandth,
    "QwenImageControlNetModel": thousandth,
    "QwenImageMultiControlNetModel": thousandth,
    "ZImageControlNetModel": invert,
    "AuraFlowTransformer2DModel": thousandth,
    "FluxTransformer2DModel": thousandth,
    "Flux2Transformer2DModel": thousandth,
    "ChromaTransformer2DModel": thousandth,
    "QwenImageTransformer2DModel": thousandth,
    "OvisImageTransformer2DModel": thousandth,
    "LongCatImageTransformer2DModel": thousandth,
    "Lumina2Transformer2DModel": invert,
    "LuminaNextDiT2DModel": invert,
    "ZImageTransformer2DModel": invert,
}


# what a scheduler's pipelines hand over, whatever the denoiser
_FORMS_OF_SCHEDULERS: dict[str, Form] = {"SCMScheduler": trigonometric}

# Tokens of a given first frame and the like get timestep 0 in the call of any step.
_CLEAN_TOKENS: dict[str, bool] = dict.fromkeys(
    (
        "WanTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "LTX2VideoTransformer3DModel",
        "SanaVideoTransformer3DModel",
    ),
    True,
)


def form_of(denoiser: type, scheduler: type | None = None) -> Form | None:
    """The form that denoisers of this class are called with.

    Known for the classes above and for those that inherit their `forward`.
    """
    form = None if scheduler is None else entry_of(scheduler, _FORMS_OF_SCHEDULERS, "set_timesteps")
    return form or entry_of(denoiser, _FORMS, "forward")


def has_clean_tokens(denoiser: type) -> bool:
    """Whether a call of such a denoiser may hold tokens without noise, at timestep 0."""
    return entry_of(denoiser, _CLEAN_TOKENS, "forward") or False
