"""Directions as values: as edits, in files, by layer, and what they do to pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from steering.recorded import gaussian

import dreamreader as dr
from dreamreader import edits
from dreamreader._checked import write_tensors
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering import (
    Directions,
    fit,
    fit_pairs,
    from_layers,
    random_like,
    to_layers,
)
from dreamreader.zoo.detector import detect


def fitted() -> Directions:
    x, labels, _, _ = gaussian(40, 6)
    rows = {"a.b": x[:, None].expand(40, 3, 6), "a.c": x[:, :4]}
    return fit(rows, labels, "red", "blue", "caa")


def test_a_saved_file_loads_back_equal(tmp_path: Path):
    directions = fitted()
    path = tmp_path / "new" / "color.safetensors"
    directions.save(path)
    again = Directions.load(path)
    assert again == directions and again.evidence == directions.evidence
    assert list(again) == ["a.b", "a.c"]
    few = fit({"s": torch.randn(2, 3)}, ["red", "blue"], "red", "blue")  # NaN in its evidence
    few.save(path)
    assert Directions.load(path) == few != directions
    assert [each.name for each in path.parent.iterdir()] == ["color.safetensors"]
    assert set(load_file(path)) == {"s"}  # any reader of safetensors finds the vectors


def test_whatever_differs_makes_directions_unequal():
    one, other = fitted(), fitted()
    assert one == other
    other.vectors["a.c"][0] += 1  # pyright: ignore[reportIndexIssue]
    assert one != other and one != {"a.b": one["a.b"]}
    assert one != one.only("a.b") and one.only("a.b", "a.c") == one


def test_files_that_are_none_say_so(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(InvalidInput, match="x.safetensors holds no directions of dreamreader"):
        Directions.load(path)
    save_file({"a": torch.ones(2)}, path, metadata={"dreamreader.directions": '{"version": 1}'})
    with pytest.raises(InvalidInput, match=r"is damaged \(it has no checksum"):
        Directions.load(path)
    write_tensors(path, {"a": torch.ones(2)}, {"dreamreader.directions": '{"version": 9}'})
    with pytest.raises(InvalidInput, match="is of version 9, this reads 1"):
        Directions.load(path)
    fitted().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidInput, match="is no safetensors file, or only a part of one"):
        Directions.load(path)


def test_directions_are_what_edits_take(tmp_path: Path):
    directions = fitted()
    steer = dr.Steer(list(directions), directions, alpha=[0.0, 2.0])
    assert steer == directions.steer(alpha=[0.0, 2.0])
    remove = directions.remove(2.0, norm_match=True)
    assert remove.per_step and remove.one_sided and remove.keeps_norm
    path = tmp_path / "edits.safetensors"
    edits.save(path, [steer, remove])
    assert edits.load(path) == [steer, remove]
    with pytest.raises(UnknownName, match="unknown site of directions 'a.d'; nearest: a"):
        directions["a.d"]
    assert "a.d" not in directions and len(directions) == 2
    assert "Directions(red -> blue, caa, norm channel)" in repr(directions)
    assert "a.c [4]: AUC" in repr(directions)


def test_random_directions_have_the_same_norms():
    directions = fitted()
    control = directions.random(seed=3)
    assert list(control) == list(directions) and control.method == "random"
    for site, vector in directions.items():
        torch.testing.assert_close(control[site].norm(dim=-1), vector.norm(dim=-1))
        assert not torch.allclose(control[site], vector, atol=0.1)


def test_layers_there_and_back():
    vectors = {3: torch.tensor([1.0, 2.0]), 12: torch.tensor([0.5, -1.0])}
    directions = from_layers(vectors, "model.layers.{layer}", source="sad", target="happy")
    assert list(directions) == ["model.layers.3", "model.layers.12"]
    assert (directions.source, directions.target) == ("sad", "happy")
    again = to_layers(directions)
    assert list(again) == [3, 12] and all(torch.equal(again[n], vectors[n]) for n in vectors)
    arrays = {n: np.asarray(each)[None] for n, each in vectors.items()}
    assert from_layers(arrays, "model.layers.{layer}", source="sad", target="happy") == directions
    named = to_layers({"unet.mid_block.attentions.0.transformer_blocks.0": torch.ones(2)}, LAYER)
    assert list(named) == [7]


LAYER = {"unet.mid_block.attentions.0.transformer_blocks.0": 7}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: to_layers({"a.1": torch.ones(3, 2)}), "holds a vector for each step"),
        (lambda: to_layers({"a.1.b.2": torch.ones(2)}), "the path has 2 numbers"),
        (lambda: to_layers({"a.b": torch.ones(2)}), "the path has 0 numbers"),
        (lambda: to_layers({"a.1": torch.ones(2), "b.1": torch.ones(2)}), "b.1: layer 1 has a"),
        (lambda: to_layers({"a.1": torch.ones(2)}, LAYER), "unknown site in layers 'a.1'"),
        (lambda: from_layers({1: torch.ones(2)}, "a.b"), r"has no \{layer\}"),
        (lambda: from_layers({}, "a.{layer}"), "there are no vectors"),
        (lambda: from_layers({-1: torch.ones(2)}, "a.{layer}"), "layer -1: a number from 0"),
        (
            lambda: from_layers({1: torch.ones(2, 2)}, "a.{layer}"),
            r"one row are needed, got \[2, 2\]",
        ),
        (
            lambda: from_layers({1: torch.ones(2) / 0}, "a.{layer}"),
            "layer 1: the vector is not finite",
        ),
    ],
)
def test_wrong_layers_say_what_is_wrong(call, text):
    with pytest.raises((InvalidInput, UnknownName), match=text):
        call()


def test_a_fitted_direction_turns_the_color_and_its_removal_and_control_do_not():
    reader = dr.load("shapes-unet")
    settings = dr.zoo.settings(num_inference_steps=8)
    shapes, seeds = ("circle", "square", "star", "cross", "triangle"), range(20, 25)
    wanted = dr.Record("unet.**.attn2", branch="cond", reduce=lambda x: x.mean(1, keepdim=True))
    red, blue = (
        reader.run([f"a large {color} {s}" for s in shapes], record=wanted, seeds=seeds, **settings)
        for color in ("red", "blue")
    )
    directions = fit_pairs(red.cache, blue.cache, labels=("red", "blue"))
    for evidence in directions.evidence.values():
        assert evidence.rows == (4, 4) and evidence.held_out == (1, 1)
        assert evidence.steps == tuple(range(8))
    prompts, seeds = [f"a large red {s}" for s in shapes[:4]], range(40, 44)

    def colors(edit) -> list[str]:
        images = reader.run(prompts, edits=edit, seeds=seeds, **settings).images
        return [found.objects[0].color if found.objects else "none" for found in detect(images)]

    pushed = colors(directions.steer(alpha=4.0, branch="cond"))
    control = colors(directions.random(0).steer(alpha=4.0, branch="cond"))
    assert pushed.count("blue") >= 3 and control.count("blue") <= 1
    back = fit_pairs(blue.cache, red.cache, labels=("blue", "red"))
    lost = colors(back.remove(4.0, norm_match=True))
    assert lost.count("red") < colors([]).count("red")


def test_random_like_matches_norms_and_keeps_one_direction():
    v = torch.randn(5, 16, dtype=torch.float64) * torch.arange(1, 6)[:, None]
    r = random_like(v, seed=3)
    assert torch.allclose(r.norm(dim=1), v.norm(dim=1))
    unit = r / r.norm(dim=1, keepdim=True)
    assert torch.allclose(unit, unit[:1].expand_as(unit))
    assert torch.equal(r, random_like(v, seed=3)) and not torch.equal(r, random_like(v, seed=4))
    assert random_like(v[0].float(), 0).shape == (16,)
