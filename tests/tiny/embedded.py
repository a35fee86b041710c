"""The embedded models untrained: right shapes and classes, pictures of noise."""

from typing import Any

from diffusers import StableDiffusionPipeline

from dreamreader.zoo import models


def untrained(name: str = "shapes-unet") -> Any:
    """A StableDiffusionPipeline of an embedded UNet model with random weights."""
    pipe = StableDiffusionPipeline(
        vae=models.build_vae(),
        scheduler=models.build_scheduler(name),
        safety_checker=None,
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
        **models.build_parts(name),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
