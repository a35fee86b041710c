"""How each family of pipelines lays out its guidance passes.

`batched`: one call of the denoiser whose batch holds the branches as equal chunks. `separate`: one
call per branch, in this order within a step. Pipelines that name their passes through
`cache_context("cond")` and the like need no entry: the clock reads the name. For `"cond_uncond"`
contexts, which say that both are in the batch but not in which order, the entry gives the order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Guided = Callable[[Any, Mapping[str, Any]], bool]
"""(pipeline, arguments of its running call) -> is classifier-free guidance on at this moment."""


def by_property(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """The pipeline's own property, read at every call: callbacks may switch it during a run."""
    return bool(pipe.do_classifier_free_guidance)


def by_argument(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """`guidance_scale > 1`, which these pipelines evaluate once, at the start of their call."""
    return float(arguments["guidance_scale"]) > 1.0


def never(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Guidance is distilled into the weights: one pass."""
    return False


@dataclass(frozen=True)
class Layout:
    """Branches of one step in their order, as chunks of one batch or as separate calls."""

    separate: bool
    order: tuple[str, ...]
    guided: Guided


UNCOND_FIRST = Layout(False, ("uncond", "cond"), by_property)
UNCOND_FIRST_LOCAL = Layout(False, ("uncond", "cond"), by_argument)
COND_FIRST = Layout(False, ("cond", "uncond"), by_property)
COND_FIRST_LOCAL = Layout(False, ("cond", "uncond"), by_argument)
IMAGE_THIRD = Layout(False, ("cond", "image", "uncond"), by_property)
SEPARATE = Layout(True, ("cond", "uncond"), never)
SINGLE = Layout(False, ("cond",), never)

_LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionDepth2ImgPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
            "StableDiffusionPAGPipeline",
            "StableDiffusionPAGImg2ImgPipeline",
            "StableDiffusionXLPAGPipeline",
            "StableDiffusionXLPAGImg2ImgPipeline",
            "StableDiffusion3PAGPipeline",
            "KolorsPipeline",
            "KolorsImg2ImgPipeline",
            "HunyuanDiTPipeline",
            "SanaPipeline",
            "AnimateDiffPipeline",
            "LTXPipeline",
            "CogView3PlusPipeline",
        ),
        UNCOND_FIRST,
    ),
    **dict.fromkeys(
        (
            "PixArtAlphaPipeline",
            "PixArtSigmaPipeline",
            "AuraFlowPipeline",
            "LattePipeline",
            "AllegroPipeline",
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
        ),
        UNCOND_FIRST_LOCAL,
    ),
    "LuminaPipeline": COND_FIRST_LOCAL,
    "StableDiffusionInstructPix2PixPipeline": IMAGE_THIRD,
    **dict.fromkeys(
        (
            "Lumina2Pipeline",
            "ChromaPipeline",
            "ChromaImg2ImgPipeline",
            "ChromaInpaintPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxKontextPipeline",
            "FluxKontextInpaintPipeline",
            "FluxControlNetPipeline",
            "CogView4ControlPipeline",
            "WanVideoToVideoPipeline",
        ),
        SEPARATE,
    ),
    **dict.fromkeys(
        (
            "FluxControlPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxFillPipeline",
            "Flux2Pipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
            "SanaSprintPipeline",
        ),
        SINGLE,
    ),
}

# named by cache_context while denoising, so without a layout above
_PROMPT_FIRST = ("CogView4Pipeline", "WanPipeline")


def layout_of(pipeline: type) -> Layout | None:
    """The layout of pipelines of this class; None when it is unknown.

    A subclass is taken for the class it derives from only while it inherits that class's
    `__call__`: another loop may well lay out its passes differently.
    """
    for base in pipeline.__mro__:
        if base.__name__ in _LAYOUTS:
            return _LAYOUTS[base.__name__]
        if "__call__" in vars(base):
            return None
    return None


def encodes_prompt_first(pipeline: type) -> bool:
    """Whether this class's `encode_prompt` is known to encode the prompt first."""
    return layout_of(pipeline) is not None or pipeline.__name__ in _PROMPT_FIRST


def chunks_of(layout: Layout, pipe: Any, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the equal chunks of a batched call, in order, at this moment of the run."""
    names = layout.order if layout.guided(pipe, arguments) else ("cond",)
    # perturbed-attention guidance appends a second conditional pass to either form
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        names = (*names, "perturbed")
    return names
