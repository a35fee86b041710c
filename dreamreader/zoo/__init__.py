"""Embedded models: small text-to-image pipelines of real diffusers classes, trained on scenes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamreader.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from dreamreader.engine import Reader

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


def load_pipeline(name: str | Path) -> Any:
    """Loads an embedded model, or a pipeline from a local folder or hub id, in float32 on the CPU.

    Args:
        name: one of `list_models()`, a folder that diffusers wrote, or a hub id with a slash.

    Returns:
        The diffusers pipeline, with its progress bar off.

    Raises:
        UnknownName: there is no such embedded model and no such folder.
        InvalidInput: the folder is not a whole pipeline.
    """
    import torch
    from diffusers import DiffusionPipeline

    folder = find(name)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **_absent(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidInput(
            f"{folder}: not a whole diffusers pipeline ({_first_line(error)})"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def find(name: str | Path) -> str:
    """The folder of an embedded model, the folder given, or the hub id as it is."""
    if name in MODELS:
        folder = WEIGHTS / str(name)
        if not (folder / "model_index.json").is_file():
            raise InvalidInput(
                f"{name}: no weights at {folder}; `dreamreader zoo train {name}` makes them"
            )
        return str(folder)
    path = Path(name)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InvalidInput(
                f"{path}: no model_index.json, so this is not a diffusers pipeline folder"
            )
        return str(path)
    text = str(name)
    if text.count("/") == 1 and not text.startswith((".", "/")):
        return text
    raise UnknownName("model", text, MODELS, "Or give a folder that diffusers wrote.")


def load(name: str | Path) -> "Reader":
    """A `Reader` of an embedded model, a local pipeline folder or a hub id.

    Example:
        >>> reader = dreamreader.load("shapes-unet")
        >>> images = reader.run("a red circle", seeds=0).images
    """
    from dreamreader.engine import Reader

    return Reader(load_pipeline(name))


def settings(**changes: Any) -> dict[str, Any]:
    """`SETTINGS` with changes, a new dict each time."""
    return {**SETTINGS, **changes}


def _absent(folder: str) -> dict[str, None]:
    """Parts that a local pipeline was saved without; diffusers wants some of them named as None."""
    index = Path(folder) / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {}
    return {name: None for name, kind in parts.items() if kind == [None, None]}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
