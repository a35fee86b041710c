"""Every tiny pipeline class of the matrix: what it is made of, how it is called, what is expected.

A new class is one `Line`; a new family of components is a builder in `tests/tiny` and one
`Family`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tiny.parts import assemble


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _mask(height: int, width: int, rows: int = 2) -> torch.Tensor:
    mask = torch.zeros(rows, 1, height, width)
    mask[..., : width // 2] = 1.0
    return mask


@dataclass(frozen=True)
class Family:
    """Sites of a denoiser (a block, an attention), and arguments that every class of it takes."""

    sites: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One pipeline class.

    Attributes:
        family: its sites and call arguments. parts: its components, those of the family unless
            it needs others.
        arguments: beside those of the family; None takes one of those away.
        names: the branches in their order where two are given the same inputs.
        unused: entries of the schedule behind the last step.
        expected: `right`, `refused` (some way to use the engine is refused), `wrong` (not yet
            right: to be mended).
    """

    name: str
    family: str
    parts: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    unused: int = 0
    expected: str = "right"

    def build(self) -> Any:
        return assemble(self.name, self.parts or self.family, **self.extra)

    def call_arguments(self) -> dict[str, Any]:
        found = {
            "num_inference_steps": 3,
            "output_type": "latent",
            **FAMILIES[self.family].arguments,
            **self.arguments,
        }
        return {key: value for key, value in found.items() if value is not None}

    @property
    def all_sites(self) -> tuple[str, ...]:
        return self.sites or FAMILIES[self.family].sites


_GUIDED = {"guidance_scale": 5.0, "negative_prompt": ["a small green tree"] * 2}
_SIZE = {"height": 16, "width": 24}
_PICTURE = {"image": _random(2, 3, 16, 24)}
_START = {**_PICTURE, "strength": 0.7, "num_inference_steps": 5}
_SIZELESS = {"height": None, "width": None}
_INPAINT = {**_START, "mask_image": _mask(16, 24)}
_CONTROL = {"control_image": _random(2, 3, 16, 24)}
_PAG = ("uncond", "cond", "perturbed")

_JOINT = (
    "transformer.transformer_blocks.0.attn.to_out.0",
    "transformer.transformer_blocks.0.attn:heads",
)
_TRUE = {"true_cfg_scale": 4.0, "negative_prompt": ["a small green tree"] * 2}
_CROSS = (
    "transformer.transformer_blocks.0.attn2",
    "transformer.transformer_blocks.0.attn1:heads",
    "transformer.transformer_blocks.1",
)
_BLOCKS = (
    "transformer.blocks.0",
    "transformer.blocks.1.attn2.to_out.0",
    "transformer.blocks.0.attn1:heads",
)
_CLEAN = {"clean_caption": False}
_VIDEO = {"video": [[_random(3, 32, 64) for _ in range(5)]] * 2}

_UNET = (
    "unet.mid_block",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2:heads",
)

FAMILIES: dict[str, Family] = {
    "sd": Family(_UNET, {**_SIZE, **_GUIDED}),
    "sdxl": Family(_UNET, {**_SIZE, **_GUIDED}),
    "deepfloyd": Family(
        ("unet.mid_block",), {"height": 8, "width": 8, **_GUIDED, "output_type": "pt", **_CLEAN}
    ),
    "sd3": Family(_JOINT, {**_SIZE, **_GUIDED, "max_sequence_length": 16}),
    "flux": Family(_JOINT, {**_SIZE, "guidance_scale": 3.5, "max_sequence_length": 16}),
    "qwen-image": Family(_JOINT, {**_SIZE, **_TRUE}),
    "chroma": Family(_JOINT, {**_SIZE, **_GUIDED, "max_sequence_length": 16}),
    "aura-flow": Family(
        (
            "transformer.joint_transformer_blocks.0.attn.to_out.0",
            "transformer.joint_transformer_blocks.0.attn:heads",
        ),
        {**_SIZE, **_GUIDED, "max_sequence_length": 16},
    ),
    "pixart-sigma": Family(
        _CROSS,
        {**_SIZE, **_GUIDED, **_CLEAN, "max_sequence_length": 16, "use_resolution_binning": False},
    ),
    "pixart-alpha": Family(_CROSS, {**_SIZE, **_GUIDED, **_CLEAN, "use_resolution_binning": False}),
    "sana": Family(
        (
            "transformer.transformer_blocks.0.attn2",
            "transformer.transformer_blocks.1",
            "transformer.transformer_blocks.0.attn2:heads",
        ),
        {
            "height": 32,
            "width": 64,
            **_GUIDED,
            **_CLEAN,
            "max_sequence_length": 16,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
    ),
    "cogview": Family(
        (
            "transformer.transformer_blocks.0.attn1.to_out.0",
            "transformer.transformer_blocks.0.attn1:heads",
        ),
        {"height": 16, "width": 32, **_GUIDED, "max_sequence_length": 16},
    ),
    "lumina2": Family(
        ("transformer.layers.0.attn", "transformer.layers.1"),
        {"height": 64, "width": 96, **_GUIDED, "max_sequence_length": 64},
    ),
    "lumina": Family(
        ("transformer.layers.0", "transformer.layers.1.attn2"),
        {"height": 64, "width": 96, **_GUIDED, **_CLEAN, "max_sequence_length": 64},
    ),
    "hunyuan-dit": Family(
        ("transformer.blocks.0", "transformer.blocks.0.attn2", "transformer.blocks.0.attn2:heads"),
        {"height": 16, "width": 16, **_GUIDED, "use_resolution_binning": False},
    ),
    "z-image": Family(
        ("transformer.layers.0", "transformer.layers.1.attention:heads"),
        {**_SIZE, **_GUIDED, "max_sequence_length": 64},
    ),
    "flux2": Family(_JOINT, {**_SIZE, "guidance_scale": 4.0, "max_sequence_length": 32}),
    "bria": Family(_JOINT, {**_SIZE, **_GUIDED, "max_sequence_length": 16}),
    "ovis": Family(_JOINT, {**_SIZE, **_GUIDED}),
    "kandinsky3": Family(
        ("unet.conv_out", "unet.down_blocks.1.attentions.0.attention"),
        {"height": 64, "width": 64, **_GUIDED},
    ),
    "wan": Family(
        _BLOCKS, {"height": 16, "width": 32, **_GUIDED, "num_frames": 5, "max_sequence_length": 16}
    ),
    "ltx": Family(
        _CROSS, {"height": 32, "width": 64, **_GUIDED, "num_frames": 9, "max_sequence_length": 16}
    ),
    "cogvideo": Family(
        _CROSS[2:],
        {"height": 32, "width": 64, **_GUIDED, "num_frames": 5, "max_sequence_length": 16},
    ),
    "mochi": Family(
        ("transformer.transformer_blocks.0.attn1.to_out.0",),
        {"height": 32, "width": 48, **_GUIDED, "num_frames": 7, "max_sequence_length": 16},
    ),
    "latte": Family(
        ("transformer.proj_out",),
        {**_SIZE, **_GUIDED, **_CLEAN, "video_length": 2},
    ),
    "allegro": Family(
        _CROSS,
        {
            "height": 32,
            "width": 64,
            **_GUIDED,
            **_CLEAN,
            "num_frames": 8,
            "max_sequence_length": 16,
        },
    ),
    "hunyuan-video": Family(
        _JOINT,
        {
            "height": 32,
            "width": 48,
            "guidance_scale": 4.0,
            "num_frames": 5,
            "max_sequence_length": 32,
        },
    ),
    "animate": Family(("unet",), {**_SIZE, **_GUIDED, "num_frames": 2}),
}

_MID = {"pag_applied_layers": "mid"}
_FIRST = {"pag_applied_layers": "1"}
_IMAGE_IN = ("cond", "image", "uncond")
_UNION = {"control_image": [_CONTROL["control_image"]], "control_mode": [0]}

LINES: list[Line] = [
    Line("StableDiffusionPipeline", "sd"),
    Line("StableDiffusionImg2ImgPipeline", "sd", arguments={**_START, **_SIZELESS}),
    Line("StableDiffusionInpaintPipeline", "sd", arguments=_INPAINT),
    Line("StableDiffusionControlNetPipeline", "sd", "sd-control", _PICTURE),
    Line("StableDiffusionControlNetImg2ImgPipeline", "sd", "sd-control", {**_START, **_CONTROL}),
    Line("StableDiffusionControlNetInpaintPipeline", "sd", "sd-control", {**_INPAINT, **_CONTROL}),
    Line(
        "StableDiffusionInstructPix2PixPipeline",
        "sd",
        "pix2pix",
        {**_PICTURE, **_SIZELESS},
        names=_IMAGE_IN,
    ),
    Line("StableDiffusionAdapterPipeline", "sd", "sd-adapter", _PICTURE),
    Line("StableDiffusionPAGPipeline", "sd", extra=_MID, names=_PAG),
    Line(
        "StableDiffusionPAGImg2ImgPipeline",
        "sd",
        arguments={**_START, **_SIZELESS},
        extra=_MID,
        names=_PAG,
    ),
    Line("StableDiffusionPAGInpaintPipeline", "sd", arguments=_INPAINT, extra=_MID, names=_PAG),
    Line(
        "StableDiffusionControlNetPAGPipeline", "sd", "sd-control", _PICTURE, extra=_MID, names=_PAG
    ),
    Line(
        "StableDiffusionControlNetPAGInpaintPipeline",
        "sd",
        "sd-control",
        {**_INPAINT, **_CONTROL},
        extra=_MID,
        names=_PAG,
    ),
    Line("StableDiffusionUpscalePipeline", "sd", "upscale", {**_PICTURE, **_SIZELESS}),
    Line("LatentConsistencyModelPipeline", "sd", "lcm", {"negative_prompt": None}),
    Line(
        "LatentConsistencyModelImg2ImgPipeline",
        "sd",
        "lcm",
        {**_START, **_SIZELESS, "negative_prompt": None},
    ),
    Line("StableDiffusionXLPipeline", "sdxl"),
    Line("StableDiffusionXLImg2ImgPipeline", "sdxl", arguments={**_START, **_SIZELESS}),
    Line("StableDiffusionXLInpaintPipeline", "sdxl", arguments=_INPAINT),
    Line("StableDiffusionXLControlNetPipeline", "sdxl", "sdxl-control", _PICTURE),
    Line(
        "StableDiffusionXLControlNetImg2ImgPipeline", "sdxl", "sdxl-control", {**_START, **_CONTROL}
    ),
    Line(
        "StableDiffusionXLControlNetInpaintPipeline",
        "sdxl",
        "sdxl-control",
        {**_INPAINT, **_CONTROL},
    ),
    Line(
        "StableDiffusionXLControlNetUnionPipeline", "sdxl", "sdxl-union", _UNION, expected="refused"
    ),
    Line(
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "sdxl",
        "sdxl-union",
        {**_START, **_UNION},
        expected="refused",
    ),
    Line(
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "sdxl",
        "sdxl-union",
        {**_INPAINT, **_UNION},
        expected="refused",
    ),
    Line(
        "StableDiffusionXLInstructPix2PixPipeline", "sdxl", "pix2pix-xl", _PICTURE, names=_IMAGE_IN
    ),
    Line("StableDiffusionXLAdapterPipeline", "sdxl", "sdxl-adapter", _PICTURE),
    Line("StableDiffusionXLPAGPipeline", "sdxl", extra=_MID, names=_PAG),
    Line(
        "StableDiffusionXLPAGImg2ImgPipeline",
        "sdxl",
        arguments={**_START, **_SIZELESS},
        extra=_MID,
        names=_PAG,
    ),
    Line("StableDiffusionXLPAGInpaintPipeline", "sdxl", arguments=_INPAINT, extra=_MID, names=_PAG),
    Line(
        "StableDiffusionXLControlNetPAGPipeline",
        "sdxl",
        "sdxl-control",
        _PICTURE,
        extra=_MID,
        names=_PAG,
    ),
    Line(
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        "sdxl",
        "sdxl-control",
        {**_START, **_CONTROL},
        extra=_MID,
        names=_PAG,
    ),
    Line("IFPipeline", "deepfloyd"),
    Line("StableDiffusion3Pipeline", "sd3"),
    Line("StableDiffusion3Img2ImgPipeline", "sd3", arguments=_START),
    Line("StableDiffusion3InpaintPipeline", "sd3", "sd3-16", _INPAINT),
    Line("StableDiffusion3PAGPipeline", "sd3", extra=_FIRST, names=_PAG),
    Line("StableDiffusion3PAGImg2ImgPipeline", "sd3", arguments=_START, extra=_FIRST, names=_PAG),
    Line("StableDiffusion3ControlNetPipeline", "sd3", "sd3-control", _CONTROL),
    Line(
        "StableDiffusion3ControlNetInpaintingPipeline",
        "sd3",
        "sd3-control-mask",
        {**_CONTROL, "control_mask": _mask(16, 24)},
    ),
    Line("FluxPipeline", "flux"),
    Line("FluxPipeline", "flux", "flux-true-cfg", {**_TRUE, "guidance_scale": None}),
    Line("FluxImg2ImgPipeline", "flux", arguments=_START),
    Line("FluxInpaintPipeline", "flux", arguments=_INPAINT),
    Line("FluxControlPipeline", "flux", "flux-channels", _CONTROL),
    Line("FluxControlImg2ImgPipeline", "flux", "flux-channels", {**_START, **_CONTROL}),
    Line("FluxControlInpaintPipeline", "flux", "flux-channels", {**_INPAINT, **_CONTROL}),
    Line("FluxControlNetPipeline", "flux", "flux-control", _CONTROL),
    Line("FluxControlNetImg2ImgPipeline", "flux", "flux-control", {**_START, **_CONTROL}),
    Line("FluxControlNetInpaintPipeline", "flux", "flux-control", {**_INPAINT, **_CONTROL}),
    Line("FluxFillPipeline", "flux", "flux-fill", {**_PICTURE, "mask_image": _mask(16, 24)}),
    Line(
        "FluxKontextPipeline",
        "flux",
        arguments={**_PICTURE, "_auto_resize": False, "max_area": 16 * 24},
    ),
    Line(
        "FluxKontextInpaintPipeline",
        "flux",
        arguments={**_INPAINT, "_auto_resize": False, "max_area": 16 * 24},
    ),
    Line("ChromaPipeline", "chroma"),
    Line("ChromaImg2ImgPipeline", "chroma", arguments=_START),
    Line("QwenImagePipeline", "qwen-image"),
    Line("QwenImageImg2ImgPipeline", "qwen-image", arguments=_START),
    Line("QwenImageInpaintPipeline", "qwen-image", arguments=_INPAINT),
    Line("QwenImageControlNetPipeline", "qwen-image", "qwen-control", _CONTROL),
    Line("AuraFlowPipeline", "aura-flow"),
    Line("PixArtAlphaPipeline", "pixart-alpha"),
    Line("PixArtSigmaPipeline", "pixart-sigma"),
    Line(
        "PixArtSigmaPAGPipeline",
        "pixart-sigma",
        extra={"pag_applied_layers": "blocks.1"},
        names=_PAG,
    ),
    Line("SanaPipeline", "sana"),
    Line(
        "SanaPAGPipeline", "sana", extra={"pag_applied_layers": "transformer_blocks.1"}, names=_PAG
    ),
    Line(
        "SanaControlNetPipeline", "sana", "sana-control", {"control_image": _random(2, 3, 32, 64)}
    ),
    Line(
        "SanaSprintPipeline",
        "sana",
        "sana-sprint",
        {"negative_prompt": None, "num_inference_steps": 2},
        unused=1,
    ),
    Line(
        "SanaSprintImg2ImgPipeline",
        "sana",
        "sana-sprint",
        {"negative_prompt": None, "num_inference_steps": 2, "image": _random(2, 3, 32, 64)},
        unused=1,
    ),
    Line("CogView3PlusPipeline", "cogview", "cogview3"),
    Line("CogView4Pipeline", "cogview", "cogview4"),
    Line(
        "CogView4ControlPipeline",
        "cogview",
        "cogview4-control",
        {"control_image": _random(2, 3, 16, 32)},
    ),
    Line("LuminaPipeline", "lumina"),
    Line("Lumina2Pipeline", "lumina2", expected="refused"),
    Line("HunyuanDiTPipeline", "hunyuan-dit"),
    Line("HunyuanDiTPAGPipeline", "hunyuan-dit", extra={"pag_applied_layers": "2"}, names=_PAG),
    Line("ZImagePipeline", "z-image"),
    Line("ZImageImg2ImgPipeline", "z-image", arguments=_START),
    Line("ZImageInpaintPipeline", "z-image", arguments=_INPAINT),
    Line("Flux2KleinPipeline", "flux2", extra={"is_distilled": False}),
    Line("BriaPipeline", "bria"),
    Line("OvisImagePipeline", "ovis"),
    Line("Kandinsky3Pipeline", "kandinsky3"),
    Line(
        "Kandinsky3Img2ImgPipeline",
        "kandinsky3",
        arguments={**_START, **_SIZELESS, "image": _random(2, 3, 64, 64)},
    ),
    Line("WanPipeline", "wan"),
    Line(
        "WanVideoToVideoPipeline",
        "wan",
        arguments={
            "video": _random(2, 5, 3, 16, 32),
            "strength": 0.7,
            "num_inference_steps": 5,
            "num_frames": None,
        },
    ),
    Line("WanImageToVideoPipeline", "wan", "wan-image", {"image": _random(1, 3, 16, 32)}),
    Line("SkyReelsV2Pipeline", "wan", "skyreels"),
    Line("LTXPipeline", "ltx"),
    Line("LTXImageToVideoPipeline", "ltx", arguments={"image": _random(2, 3, 32, 64)}),
    Line("LTXConditionPipeline", "ltx", "ltx-unshifted"),
    Line("CogVideoXPipeline", "cogvideo"),
    Line(
        "CogVideoXImageToVideoPipeline",
        "cogvideo",
        "cogvideo-image",
        {"image": _random(2, 3, 32, 64)},
    ),
    Line(
        "CogVideoXVideoToVideoPipeline",
        "cogvideo",
        arguments={**_VIDEO, "strength": 0.7, "num_inference_steps": 5, "num_frames": None},
    ),
    Line(
        "CogVideoXFunControlPipeline",
        "cogvideo",
        "cogvideo-image",
        {"control_video": _VIDEO["video"], "num_frames": None},
    ),
    Line("MochiPipeline", "mochi"),
    Line("LattePipeline", "latte", expected="refused"),
    Line("AllegroPipeline", "allegro"),
    Line("HunyuanVideoPipeline", "hunyuan-video"),
    Line("AnimateDiffPipeline", "animate"),
    Line("AnimateDiffSDXLPipeline", "animate", "animate-xl"),
    Line("AnimateDiffPAGPipeline", "animate", extra=_MID, names=_PAG),
    Line(
        "AnimateDiffVideoToVideoPipeline",
        "animate",
        arguments={
            "video": [[_random(3, 16, 24)] * 2] * 2,
            "strength": 0.7,
            "num_inference_steps": 5,
            "num_frames": None,
        },
    ),
]
