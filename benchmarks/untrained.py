"""An embedded model with random weights: the same work for the machine where none are trained."""

from pathlib import Path


def save_untrained(name: str, folder: str | Path) -> str:
    """Builds the pipeline from its configuration and saves it; the folder, for `load_pipeline`."""
    from dreamreader.zoo import models

    pipe = models.assemble(name, models.build_parts(name), models.build_vae())
    pipe.save_pretrained(folder)
    return str(folder)
