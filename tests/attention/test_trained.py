"""On the trained models the map of the shape word lies on the object that the detector finds."""

import pytest
import torch

import dreamreader as dr
from dreamreader.attention import iou, pointing, word_maps
from dreamreader.zoo import data
from dreamreader.zoo.detector import detect


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_the_shape_word_finds_the_object(name: str) -> None:
    drawn = [
        scene
        for scene in data.held_out_scenes(100, 5)
        if len(scene.objects) == 1 and {"place", "color"} <= scene.objects[0].said
    ][:16]
    settings = dr.zoo.settings(num_inference_steps=10, output_type="pt")
    words = [[scene.objects[0].shape] for scene in drawn]
    maps = word_maps(
        dr.load(name), [scene.caption() for scene in drawn], words, seeds=100, **settings
    )
    readings = detect(maps.images)
    shown = [n for n, each in enumerate(readings) if each.objects]
    assert len(shown) >= 14
    masks = torch.stack([readings[n].objects[0].mask for n in shown])
    heat = maps.upsampled(64).maps[shown]
    shuffled = heat.roll(1, 0)  # the same word's map in another picture
    assert float(pointing(heat, masks).mean()) > 0.85
    assert float(pointing(shuffled, masks).mean()) < 0.4
    assert float(iou(heat, masks, "area").mean()) > 0.4
    assert float(iou(shuffled, masks, "area").mean()) < 0.2
    assert float(iou(heat, masks).mean()) > 0.3
