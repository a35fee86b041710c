"""Arguments with one entry for each row, and the memory of a run of several batches."""

from typing import Any

import diffusers
import pytest
import torch

import dreamreader as dr
from dreamreader.errors import InvalidInput

from .. import tiny

SITE = "unet.mid_block"
TWO = ["a red cat", "a large blue circle"]


def _settings(**kwargs: Any) -> dict[str, Any]:
    return {**tiny.arguments("sd", 2), "output_type": "latent", "seeds": 0, **kwargs}


@pytest.mark.parametrize("batch_size", [None, 1])
def test_one_entry_for_all_rows_stands_for_each(batch_size: int | None) -> None:
    reader = dr.Reader(tiny.pipeline("sd"))
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    settings = _settings(height=16, width=24, batch_size=batch_size)
    settings["negative_prompt"] = ["a dog"]
    one = reader.run(TWO, latents=latents, **settings)
    settings["negative_prompt"] = ["a dog"] * 2
    each = reader.run(TWO, latents=latents.repeat(2, 1, 1, 1), **settings)
    assert torch.equal(one.images, each.images)


def test_one_picture_for_all_rows_stands_for_each() -> None:
    parts = tiny.pipeline("sd").components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    settings = {"seeds": [1, 2], "num_inference_steps": 3, "output_type": "latent", "strength": 0.7}
    one = dr.Reader(pipe).run(TWO, image=picture, **settings)
    each = dr.Reader(pipe).run(TWO, image=picture.repeat(2, 1, 1, 1), **settings)
    assert torch.equal(one.images, each.images)


def test_latents_of_another_number_are_refused() -> None:
    reader = dr.Reader(tiny.pipeline("sd"))
    with pytest.raises(InvalidInput, match="latents: has 3 entries, the run has 2 rows"):
        reader.run(TWO, latents=torch.zeros(3, 4, 8, 12), **_settings())


def test_the_memory_limit_is_that_of_all_batches() -> None:
    reader = dr.Reader(tiny.pipeline("sd"))
    whole = reader.run(TWO, record=SITE, **_settings()).cache[SITE].tensor
    size = whole.numel() * whole.element_size()
    for batch_size in (1, 2):
        run = {**_settings(batch_size=batch_size), "record": SITE}
        found = reader.run(TWO, memory_limit=size, **run).cache[SITE].tensor
        assert found.shape == whole.shape
        with pytest.raises(InvalidInput, match="raise memory_limit"):
            reader.run(TWO, memory_limit=size - 1, **run)
