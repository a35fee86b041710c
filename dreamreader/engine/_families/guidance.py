"""How each family of pipelines lays out its guidance passes.

`batched`: one call of the denoiser whose batch holds the branches as equal chunks. `separate`: one
call per branch, in this order within a step. Pipelines that name their passes through
`cache_context("cond")` and the like need no entry: the clock reads the name. For `"cond_uncond"`
contexts, which say that both are in the batch but not in which order, the entry gives the order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dreamreader.engine._families.classes import entry_of

Guided = Callable[[Any, Mapping[str, Any]], bool]
"""(pipeline, arguments of its running call) -> is classifier-free guidance on at this moment."""


def by_property(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """The pipeline's own property, read at every call: callbacks may switch it during a run."""
    return bool(pipe.do_classifier_free_guidance)


def by_argument(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """`guidance_scale > 1`, which these pipelines evaluate once, at the start of their call."""
    return float(arguments["guidance_scale"]) > 1.0


def by_both_scales(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """InstructPix2Pix for SDXL: guided by the text and by the picture, or not at all."""
    return float(arguments["guidance_scale"]) > 1.0 <= float(arguments["image_guidance_scale"])


def never(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Guidance is distilled into the weights: one pass."""
    return False


@dataclass(frozen=True)
class BranchLayout:
    """Branches of one step in their order, as chunks of one batch or as separate calls.

    Args:
        separate: one call for each branch instead of one for all.
        order: the branches.
        guided: whether guidance is on.
        truncates: guidance may rest at single steps, where the batch holds the prompt alone.
    """

    separate: bool
    order: tuple[str, ...]
    guided: Guided
    truncates: bool = False


UNCOND_FIRST = BranchLayout(False, ("uncond", "cond"), by_property)
UNCOND_FIRST_LOCAL = BranchLayout(False, ("uncond", "cond"), by_argument)
COND_FIRST = BranchLayout(False, ("cond", "uncond"), by_property)
COND_FIRST_LOCAL = BranchLayout(False, ("cond", "uncond"), by_argument)
COND_FIRST_TRUNCATED = BranchLayout(False, ("cond", "uncond"), by_property, truncates=True)
IMAGE_THIRD = BranchLayout(False, ("cond", "image", "uncond"), by_property)
IMAGE_THIRD_LOCAL = BranchLayout(False, ("cond", "image", "uncond"), by_both_scales)
SEPARATE = BranchLayout(True, ("cond", "uncond"), never)
SINGLE = BranchLayout(False, ("cond",), never)

_LAYOUTS: dict[str, BranchLayout] = {
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
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
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
            "StableDiffusion3PAGImg2ImgPipeline",
            "StableDiffusionPAGInpaintPipeline",
            "StableDiffusionXLPAGInpaintPipeline",
            "StableDiffusionControlNetPAGPipeline",
            "StableDiffusionControlNetPAGInpaintPipeline",
            "StableDiffusionXLControlNetPAGPipeline",
            "StableDiffusionXLControlNetPAGImg2ImgPipeline",
            "HunyuanDiTPAGPipeline",
            "KolorsPAGPipeline",
            "SanaPAGPipeline",
            "AnimateDiffPAGPipeline",
            "KolorsPipeline",
            "KolorsImg2ImgPipeline",
            "HunyuanDiTPipeline",
            "HunyuanDiTControlNetPipeline",
            "SanaPipeline",
            "SanaControlNetPipeline",
            "SanaVideoPipeline",
            "SanaImageToVideoPipeline",
            "AnimateDiffPipeline",
            "AnimateDiffSDXLPipeline",
            "AnimateDiffControlNetPipeline",
            "AnimateDiffSparseControlNetPipeline",
            "AnimateDiffVideoToVideoPipeline",
            "AnimateDiffVideoToVideoControlNetPipeline",
            "LTXPipeline",
            "LTXImageToVideoPipeline",
            "LTXConditionPipeline",
            "MochiPipeline",
            "KandinskyV22Pipeline",
            "KandinskyV22Img2ImgPipeline",
            "KandinskyV22InpaintPipeline",
            "KandinskyV22PriorPipeline",
            "Kandinsky3Pipeline",
            "Kandinsky3Img2ImgPipeline",
            "BriaPipeline",
            "EasyAnimatePipeline",
            "EasyAnimateControlPipeline",
            "EasyAnimateInpaintPipeline",
            "CogView3PlusPipeline",
        ),
        UNCOND_FIRST,
    ),
    **dict.fromkeys(
        (
            "PixArtAlphaPipeline",
            "PixArtSigmaPipeline",
            "PixArtSigmaPAGPipeline",
            "AuraFlowPipeline",
            "LattePipeline",
            "AllegroPipeline",
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
            "ConsisIDPipeline",
            "KandinskyPipeline",
            "KandinskyPriorPipeline",
            "KandinskyImg2ImgPipeline",
            "KandinskyInpaintPipeline",
            "KandinskyV22ControlnetPipeline",
            "KandinskyV22ControlnetImg2ImgPipeline",
            "KandinskyV22PriorEmb2EmbPipeline",
            "IFPipeline",
            "IFImg2ImgPipeline",
            "IFInpaintingPipeline",
            "IFSuperResolutionPipeline",
            "IFImg2ImgSuperResolutionPipeline",
            "IFInpaintingSuperResolutionPipeline",
            "StableDiffusionUpscalePipeline",
            "StableDiffusionLatentUpscalePipeline",
        ),
        UNCOND_FIRST_LOCAL,
    ),
    "LuminaPipeline": COND_FIRST_LOCAL,
    **dict.fromkeys(
        (
            "StableCascadePriorPipeline",
            "StableCascadeDecoderPipeline",
            "WuerstchenPriorPipeline",
            "WuerstchenDecoderPipeline",
        ),
        COND_FIRST,
    ),
    **dict.fromkeys(
        (
            "ZImagePipeline",
            "ZImageImg2ImgPipeline",
            "ZImageInpaintPipeline",
            "ZImageControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
            "ZImageOmniPipeline",
        ),
        COND_FIRST_TRUNCATED,
    ),
    "StableDiffusionInstructPix2PixPipeline": IMAGE_THIRD,
    "StableDiffusionXLInstructPix2PixPipeline": IMAGE_THIRD_LOCAL,
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
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxFillPipeline",
            "Flux2Pipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
            "SanaSprintPipeline",
            "SanaSprintImg2ImgPipeline",
        ),
        SINGLE,
    ),
}

# named by cache_context while denoising, so without a layout above
_NAMED = {"CogView4Pipeline": SEPARATE, "WanPipeline": SEPARATE}
_PROMPT_FIRST: dict[str, BranchLayout] = {**_LAYOUTS, **_NAMED}

# These take `num_videos_per_prompt` and make one video all the same.
_ONE_VIDEO: dict[str, bool] = dict.fromkeys(
    (
        "AllegroPipeline",
        "AnimateDiffPipeline",
        "AnimateDiffControlNetPipeline",
        "AnimateDiffPAGPipeline",
        "AnimateDiffSDXLPipeline",
        "AnimateDiffSparseControlNetPipeline",
        "AnimateDiffVideoToVideoPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        "CogVideoXPipeline",
        "CogVideoXFunControlPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "ConsisIDPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "WanVideoToVideoPipeline",
    ),
    True,
)


# Given negative prompts, these embed them as rows of their own, behind those of the prompts.
_NEGATIVE_ROWS: dict[str, bool] = dict.fromkeys(
    ("KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"),
    True,
)


def layout_of(pipeline: type) -> BranchLayout | None:
    """The layout of pipelines of this class; None when it is unknown.

    A subclass is taken for the class it derives from only while it inherits that class's
    `__call__`: another loop may well lay out its passes differently.
    """
    return entry_of(pipeline, _LAYOUTS, "__call__")


def encodes_prompt_first(pipeline: type) -> bool:
    """Whether this class's `encode_prompt` is known to encode the prompt first."""
    return entry_of(pipeline, _PROMPT_FIRST, "encode_prompt") is not None


def makes_one_video(pipeline: type) -> bool:
    """Whether this class makes one video for each prompt, whatever its arguments say."""
    return entry_of(pipeline, _ONE_VIDEO, "__call__") is not None


def embeds_negative_rows(pipeline: type) -> bool:
    """Whether this class makes rows of negative prompts too."""
    return entry_of(pipeline, _NEGATIVE_ROWS, "__call__") is not None


def chunks_of(layout: BranchLayout, pipe: Any, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the equal chunks of a batched call, in order, at this moment of the run."""
    names = layout.order if layout.guided(pipe, arguments) else ("cond",)
    # perturbed-attention guidance appends a second conditional pass to either form
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        names = (*names, "perturbed")
    return names
