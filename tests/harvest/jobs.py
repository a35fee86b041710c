"""Small harvests for tests: of the embedded U-Net and of a tiny language model."""

from functools import cache
from pathlib import Path
from typing import Any

import tiny

from dreamreader import load
from dreamreader.engine import Reader
from dreamreader.harvest import Harvest

PROMPTS = ["a red circle", "a blue square", "a green star"]
TEXTS = ["a cat", "a red dog on a tree", "b", "the quick brown fox"]
MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
LAYER = "transformer.h.1"


@cache
def unet() -> Reader:
    return load("shapes-unet")


@cache
def gpt2() -> Reader:
    return Reader(*tiny.language_model("gpt2"))


def pictures(**changes: Any) -> Harvest:
    """Three prompts with two seeds, two steps, in units of four samples and batches of three."""
    fields: dict[str, Any] = {
        "name": "pictures",
        "subject": "shapes-unet",
        "reader": unet(),
        "data": {"prompts": PROMPTS},
        "seeds": {"count": 2},
        "pipeline": {"num_inference_steps": 2},
        "capture": [{"sites": MIDDLE}],
        "batch": {"rows": 3},
        "store": {"unit": 4},
    }
    return Harvest(**(fields | changes))


def texts(**changes: Any) -> Harvest:
    """Four texts in units of three samples and batches of two."""
    fields: dict[str, Any] = {
        "name": "texts",
        "subject": "gpt2",
        "reader": gpt2(),
        "data": {"prompts": TEXTS},
        "capture": [{"sites": LAYER, "dtype": "model"}],
        "batch": {"rows": 2},
        "store": {"unit": 3},
    }
    return Harvest(**(fields | changes))


def content(store: Path) -> dict[str, bytes]:
    """Every file of the sealed units, by its path."""
    files = (store / "shards").rglob("*.*")
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file()}
