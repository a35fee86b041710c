"""Which arguments of a pipeline's call have one entry for each row.

Needed where the rows of a run are computed in several batches: what is known to belong to a row
goes with it, what is known to be common goes to every batch, and the rest is refused where it
could be either. A class is known only with the `__call__` of diffusers itself.
"""

from collections.abc import Iterable
from typing import Any

from dreamreader.engine._families.classes import author_of

TEXTS = ("prompt_2", "prompt_3", "prompt_4", "negative_prompt", "negative_prompt_2")
TEXTS += ("negative_prompt_3", "negative_prompt_4", "neg_prompt")

_EVERYWHERE = {  # in every class of diffusers that takes them
    *TEXTS,
    "latents",
    *(
        f"{sign}{kind}"
        for sign in ("", "negative_")
        for kind in (
            "prompt_embeds",
            "prompt_embeds_2",
            "pooled_prompt_embeds",
            "prompt_attention_mask",
            "prompt_attention_mask_2",
            "prompt_embeds_mask",
        )
    ),
}

_COMMON = {"timesteps", "sigmas", "callback_on_step_end_tensor_inputs"}

PICTURES = (
    *("image", "mask_image", "control_image", "control_mask", "masked_image_latents"),
    *("video", "control_video"),
)


def _classes(pattern: str, *suffixes: str) -> Iterable[str]:
    return (f"{pattern}{suffix}Pipeline" for suffix in suffixes)


_ROWS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *_classes("StableDiffusion", "Img2Img", "Inpaint", "InstructPix2Pix", "Upscale"),
            *_classes("StableDiffusion", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
            *_classes("StableDiffusion", "Adapter", "PAGImg2Img", "PAGInpaint"),
            *_classes("StableDiffusion", "ControlNetPAG", "ControlNetPAGInpaint"),
            *_classes("StableDiffusionXL", "Img2Img", "Inpaint", "Adapter", "InstructPix2Pix"),
            *_classes("StableDiffusionXL", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
            *_classes("StableDiffusionXL", "PAGImg2Img", "PAGInpaint"),
            *_classes("StableDiffusionXL", "ControlNetPAG", "ControlNetPAGImg2Img"),
            *_classes("StableDiffusion3", "Img2Img", "Inpaint", "PAGImg2Img"),
            *_classes("StableDiffusion3", "ControlNet", "ControlNetInpainting"),
            *_classes("LatentConsistencyModel", "Img2Img"),
            *_classes("Flux", "Img2Img", "Inpaint", "Fill", "Kontext", "KontextInpaint"),
            *_classes("Flux", "Control", "ControlImg2Img", "ControlInpaint"),
            *_classes("Flux", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
            *_classes("Chroma", "Img2Img"),
            *_classes("QwenImage", "Img2Img", "Inpaint", "ControlNet"),
            *_classes("", "CogView4Control", "SanaControlNet", "SanaSprintImg2Img"),
            *_classes("ZImage", "Img2Img", "Inpaint"),
            *_classes("Kandinsky3", "Img2Img"),
            *_classes("", "CogVideoXImageToVideo", "LTXImageToVideo"),
        ),
        PICTURES[:5],
    ),
    **dict.fromkeys(
        _classes("", "CogVideoXVideoToVideo", "WanVideoToVideo", "AnimateDiffVideoToVideo"),
        ("video",),
    ),
    "CogVideoXFunControlPipeline": ("control_video",),
}

# a list is several references for all rows
_REFERENCES: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        *_classes("Flux2", "", "Klein", "KleinKV"),
        "QwenImageEditPlusPipeline",
    ),
    ("image",),
)


# these treat the padding of a text by what else is in the batch
_ONE_ROW = ("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline", "LattePipeline")


def needs_one_row(pipeline: type) -> bool:
    """Whether a picture of this class depends on the texts that are in the batch beside its own."""
    own = author_of(pipeline, "__call__")
    return own is not None and own.__name__ in _ONE_ROW


def meaning(pipeline: type, name: str) -> bool | None:
    """Whether argument `name` has one entry for each row; None where that is not known."""
    if name in _COMMON:
        return False
    own = author_of(pipeline, "__call__")
    if own is None:
        return True if name in TEXTS else None
    if name in _EVERYWHERE or name in _ROWS.get(own.__name__, ()):
        return True
    return False if name in _REFERENCES.get(own.__name__, ()) else None


def has_several_networks(pipe: Any) -> bool:
    """Whether a list of pictures is one for each of several ControlNets or adapters."""
    parts = (getattr(pipe, name, None) for name in ("controlnet", "adapter"))
    return any(type(part).__name__.startswith("Multi") for part in parts)
