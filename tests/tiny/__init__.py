"""Very small real pipelines and language models, built from config with seeded random weights.

`pipeline(name)` and `language_model(name)` build a new object each time; its weights depend only on
the name. `arguments(name)` gives call arguments that keep a run short: few steps, a small picture
that is not square, short prompts, guidance on.
"""

from collections.abc import Callable
from typing import Any

from . import dit, language, mmdit, unets

_PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": unets.stable_diffusion,
    "sdxl": unets.stable_diffusion_xl,
    "sd-img2img": unets.stable_diffusion_img2img,
    "sdxl-img2img": unets.stable_diffusion_xl_img2img,
    "sd3": mmdit.stable_diffusion_3,
    "flux": mmdit.flux,
    "flux-true-cfg": mmdit.flux_true_cfg,
    "flux-img2img": mmdit.flux_img2img,
    "qwen-image": mmdit.qwen_image,
    "aura-flow": mmdit.aura_flow,
    "pixart-sigma": dit.pixart_sigma,
    "sana": dit.sana,
    "cogview4": dit.cogview4,
    "lumina2": dit.lumina2,
}
_LANGUAGE_MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gpt2": language.gpt2,
    "gpt-neox": language.gpt_neox,
    "llama": language.llama,
    "qwen2": language.qwen2,
    "qwen3": language.qwen3,
    "gemma2": language.gemma2,
    "gemma3": language.gemma3,
}
PIPELINES: list[str] = list(_PIPELINES)
LANGUAGE_MODELS: list[str] = list(_LANGUAGE_MODELS)

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "sd": {"guidance_scale": 5.0},
    "sdxl": {"guidance_scale": 5.0},
    "sd-img2img": {"guidance_scale": 5.0, "strength": 0.6},
    "sdxl-img2img": {"guidance_scale": 5.0, "strength": 0.6},
    "sd3": {"guidance_scale": 5.0, "max_sequence_length": 16},
    "flux": {"guidance_scale": 3.5, "max_sequence_length": 16},
    "flux-true-cfg": {
        "true_cfg_scale": 4.0,
        "negative_prompt": "a dog",
        "max_sequence_length": 16,
    },
    "flux-img2img": {"guidance_scale": 3.5, "max_sequence_length": 16, "strength": 0.6},
    "qwen-image": {"true_cfg_scale": 4.0, "negative_prompt": "a dog"},
    "aura-flow": {"guidance_scale": 3.5, "max_sequence_length": 16},
    "pixart-sigma": {
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    "sana": {
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    },
    "cogview4": {"guidance_scale": 5.0},
    "lumina2": {"guidance_scale": 4.0, "max_sequence_length": 64},
}

# 8 x 12 latents (8 x 16 where the pipeline asks for multiples of 16 or 32); img2img of the UNets
# takes the size of its image
_SIZES: dict[str, tuple[int, int]] = {
    **{name: (16, 24) for name in _PIPELINES if name not in ("sd-img2img", "sdxl-img2img")},
    "sana": (32, 64),
    "cogview4": (16, 32),
    "lumina2": (64, 96),
}


def pipeline(name: str) -> Any:
    """Build the pipeline `name` (one of `PIPELINES`), with its progress bar switched off."""
    pipe = _PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def language_model(name: str) -> tuple[Any, Any]:
    """Build the language model `name` (one of `LANGUAGE_MODELS`) and its tokenizer."""
    return _LANGUAGE_MODELS[name]()


def arguments(name: str, steps: int = 4) -> dict[str, Any]:
    """Call arguments of pipeline `name`, without prompt, generator and input image."""
    found = {"num_inference_steps": steps, **_ARGUMENTS[name]}
    if name in _SIZES:
        found["height"], found["width"] = _SIZES[name]
    return found
