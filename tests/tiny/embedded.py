"""The embedded models untrained: right shapes and classes, pictures of noise."""

from typing import Any

from dreamreader.zoo import models


def untrained(name: str = "shapes-unet") -> Any:
    """The pipeline of an embedded model with random weights."""
    pipe = models.assemble(name, models.build_parts(name), models.build_vae())
    pipe.set_progress_bar_config(disable=True)
    return pipe
