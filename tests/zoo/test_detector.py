"""The detector is the ruler of every claim: it must read rendered scenes nearly without error."""

import random

import pytest
import torch
from PIL import Image

from dreamreader.zoo import scenes
from dreamreader.zoo.detector import detect


def read_back(scene: scenes.Scene, reading) -> bool:
    places = {(f.row, f.column): f for f in reading.objects}
    found = [places.get((o.row, o.column)) for o in scene.objects]
    return (
        reading.background == scene.background
        and reading.frame == scene.frame
        and len(reading.objects) == len(scene.objects)
        and all(
            f is not None and (f.shape, f.color, f.size) == (o.shape, o.color, o.size)
            for f, o in zip(found, scene.objects, strict=True)
        )
    )


def test_it_reads_rendered_scenes_right():
    rng = random.Random(1)
    drawn = [scenes.sample_scene(rng) for _ in range(1000)]
    readings = detect([scenes.render(s, rng) for s in drawn])
    assert sum(map(read_back, drawn, readings)) >= 995


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_it_bears_noise(noise):
    rng = random.Random(2)
    drawn = [scenes.sample_scene(rng) for _ in range(200)]
    pixels = torch.stack([_tensor(scenes.render(s, rng)) for s in drawn])
    generator = torch.Generator().manual_seed(0)
    readings = detect((pixels + noise * torch.randn(pixels.shape, generator=generator)).clamp(0, 1))
    assert sum(map(read_back, drawn, readings)) >= 190


def test_an_empty_picture_has_no_object():
    (reading,) = detect([Image.new("RGB", (64, 64), scenes.BACKGROUNDS["gray"])])
    assert reading.objects == ()
    assert reading.background == "gray"
    assert not reading.frame


def test_a_blob_that_is_no_shape_is_not_forced_into_one():
    picture = Image.new("RGB", (64, 64), scenes.BACKGROUNDS["white"])
    picture.paste(scenes.COLORS["red"], (10, 30, 54, 34))
    (reading,) = detect([picture])
    assert [f.shape for f in reading.objects] == [None]
    assert reading.objects[0].color == "red"


def on_white(color: tuple[int, int, int], box: tuple[int, int, int, int]) -> Image.Image:
    picture = Image.new("RGB", (64, 64), scenes.BACKGROUNDS["white"])
    picture.paste(color, box)
    return picture


@pytest.mark.parametrize(("darker", "objects"), [(48, 0), (54, 1)])
def test_an_object_differs_by_a_fifth_in_every_channel(darker: int, objects: int):
    (reading,) = detect([on_white((245 - darker,) * 3, (20, 20, 40, 40))])
    assert len(reading.objects) == objects


def test_specks_are_no_objects():
    speck = on_white(scenes.COLORS["red"], (30, 30, 36, 34))
    smaller = speck.copy()
    smaller.putpixel((30, 30), scenes.BACKGROUNDS["white"])
    assert [len(each.objects) for each in detect([speck, smaller])] == [1, 0]


@pytest.mark.parametrize(("side", "size"), [(21, "small"), (22, "large")])
def test_the_longer_side_decides_the_size(side: int, size: str):
    for box in ((20, 20, 20 + side, 38), (20, 20, 38, 20 + side)):
        (reading,) = detect([on_white(scenes.COLORS["red"], box)])
        assert [each.size for each in reading.objects] == [size]


def test_masks_cover_the_object():
    scene = scenes.Scene((scenes.Obj("square", "blue", "large", "middle", "center"),), "white")
    (reading,) = detect([scenes.render(scene)])
    assert reading.objects[0].area == pytest.approx((2 * 0.9 * 13) ** 2, rel=0.1)


def test_other_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"expected pictures \[n, 3, 64, 64\], got \[1, 3, 32, 32\]"
    ):
        detect(torch.zeros(1, 3, 32, 32))


def _tensor(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
