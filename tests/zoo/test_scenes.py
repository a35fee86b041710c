"""Scenes: what captions say, what they leave out, what training never shows."""

import random
from collections import Counter

import pytest

from dreamreader.zoo import data, scenes


def drawn(count: int, **kw) -> list[scenes.Scene]:
    rng = random.Random(7)
    return [scenes.sample_scene(rng, **kw) for _ in range(count)]


def test_the_world_is_as_large_as_promised():
    assert len(scenes.COLORS) >= 8
    assert len(scenes.SHAPES) >= 5
    assert len(scenes.BACKGROUNDS) >= 2
    assert {len(s.objects) for s in drawn(200)} == {1, 2}
    assert {s.frame for s in drawn(200)} == {True, False}


def test_a_caption_says_what_is_said_and_nothing_else():
    star = scenes.Obj("star", "orange", "small", "top", "left")
    scene = scenes.Scene((star,), "white", frame=True)
    assert (
        scene.caption() == "a small orange star at the top left on a white background with a frame"
    )
    quiet = scenes.Scene(
        (scenes.Obj("star", "orange", "small", "top", "left", frozenset({"color"})),), "white"
    )
    assert quiet.caption() == "an orange star on a white background"


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_unsaid_colours_follow_the_stated_habit(shape):
    found = Counter(
        o.color
        for s in drawn(20_000, objects=1)
        for o in s.objects
        if o.shape == shape and "color" not in o.said
    )
    usual, share = scenes.UNSAID_COLOR[shape]
    assert found.total() > 200
    assert found[usual] / found.total() == pytest.approx(share, abs=0.08)


def test_training_never_shows_what_is_held_out():
    rng = random.Random(3)
    for _ in range(2000):
        scene = data.training_scene(rng)
        assert not scene.held_out()
        assert not any((o.color, o.shape) in scenes.HELD_OUT_PAIRS for o in scene.objects)


def test_held_out_sets_are_disjoint_from_training_and_without_repeats():
    seen, unseen = data.held_out_scenes(128, 0), data.held_out_scenes(64, 0, pairs=True)
    captions = [s.caption() for s in seen]
    assert len(set(captions)) == 128
    assert all(scenes.caption_held_out(c) for c in captions)
    assert all(s.pair_held_out() for s in unseen)


def test_two_objects_never_touch():
    for scene in drawn(3000, objects=2):
        a, b = scene.objects
        gap = max(
            abs(scenes.ROWS[a.row] - scenes.ROWS[b.row]),
            abs(scenes.COLUMNS[a.column] - scenes.COLUMNS[b.column]),
        )
        assert gap >= scenes.SIZES[a.size] + scenes.SIZES[b.size]


def test_an_unknown_shape_is_refused_by_name():
    scene = scenes.Scene((scenes.Obj("hexagon", "red", "small", "top", "left"),), "white")
    with pytest.raises(ValueError, match="hexagon.*circle, square"):
        scenes.render(scene)
