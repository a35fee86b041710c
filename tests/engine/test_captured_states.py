"""Edits of text encoder layers reach pipelines that read `hidden_states`, in every run."""

from typing import Any

import pytest
import tiny
import torch

from dreamreader.edits import Scale, Steer
from dreamreader.engine import Reader


@pytest.mark.parametrize(
    "name, site",
    [
        ("sdxl", "text_encoder.encoder.layers.0"),
        ("sdxl", "text_encoder_2.text_model.encoder.layers.0"),
        ("sd3", "text_encoder.text_model.encoder.layers.0"),
        ("lumina2", "text_encoder.layers.0"),
    ],
)
def test_the_second_run_is_edited_like_the_first(name: str, site: str) -> None:
    reader = Reader(tiny.pipeline(name))
    kw: dict[str, Any] = {**tiny.arguments(name), "output_type": "pt", "seeds": 1}
    edit = Scale(site, 0.0)
    first = reader.run("a red cat", edits=edit, **kw).images
    second = reader.run("a red cat", edits=edit, **kw).images
    plain = reader.run("a red cat", **kw).images
    assert float((first - plain).abs().max()) > 1e-3
    assert torch.equal(first, second)


def test_edits_still_follow_one_another_through_nested_blocks() -> None:
    reader = Reader(tiny.pipeline("sdxl"))
    kw: dict[str, Any] = {**tiny.arguments("sdxl"), "output_type": "pt"}
    site = "text_encoder.encoder.layers.0"
    reader.run("a red cat", seeds=1, **kw)  # transformers has its hooks from here on
    with reader.editing(Scale(site, 0.0)), reader.editing(Steer(site, torch.ones(16), 2.0)):
        with reader.recording(site) as cache:
            reader.subject("a red cat", generator=torch.Generator().manual_seed(1), **kw)
    assert torch.equal(cache[site].tensor, torch.full_like(cache[site].tensor, 2.0))
