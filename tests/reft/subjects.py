"""Tiny subjects and paired prompts of the tests."""

from functools import cache
from typing import Any

import tiny

from dreamreader.engine import Reader
from dreamreader.reft import Pairs, record_pairs

SITES = [
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2",
]
BASE = ["a red cat", "a dog", "a blue tree", "a red dog"]
TEACHER = [f"{each} in the snow" for each in BASE]
LAYER = "model.layers.1"


@cache
def pipeline() -> Reader:
    return Reader(tiny.pipeline("sd"))


@cache
def language() -> Reader:
    return Reader(*tiny.language_model("llama"))


def settings(steps: int = 3) -> dict[str, Any]:
    return tiny.arguments("sd", steps)


@cache
def pairs() -> Pairs:
    return record_pairs(pipeline(), BASE, TEACHER, SITES, **settings())
