"""The embedded models: their names, where their weights are, and how they are evaluated."""

from pathlib import Path
from typing import Any

MODELS = {
    "shapes-unet": "StableDiffusionPipeline, UNet widths 48-96-96-96, v-prediction",
    "shapes-unet-b": "StableDiffusionPipeline, UNet widths 40-80-80-96, another seed",
    "shapes-dit": "StableDiffusion3Pipeline, 6 joint blocks of width 128, flow matching",
}
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 2.0}
"""What the embedded models are evaluated with; pass it to the pipeline call."""

WEIGHTS = Path(__file__).parent / "weights"


def list_models() -> list[str]:
    """Names of the embedded models."""
    return list(MODELS)


def settings(**changes: Any) -> dict[str, Any]:
    """`SETTINGS` with changes, a new dict each time."""
    return {**SETTINGS, **changes}
