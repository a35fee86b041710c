"""Every kind of thing comes back from its file as it was; what is no such file says why."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dreamreader as dr
from dreamreader._checked import read_tensors, write_tensors
from dreamreader.artifacts import Artifact, load, save
from dreamreader.edits import Edits
from dreamreader.engine._request import same
from dreamreader.errors import InvalidInput
from dreamreader.steering import Directions
from tests.artifacts.things import THINGS, cache, directions, grid, reft, word_maps, written

kinds = pytest.mark.parametrize("kind", THINGS)


@kinds
def test_a_file_gives_back_what_was_saved(kind: str, tmp_path: Path) -> None:
    thing, path = THINGS[kind](), tmp_path / "new" / "thing"
    thing.save(path)
    for found in (load(path), type(thing).load(path), load(path, type(thing))):
        assert written(found) == written(thing)
    first = path.read_bytes()
    load(path).save(path)
    assert path.read_bytes() == first  # equal things are equal files
    assert [each.name for each in path.parent.iterdir()] == ["thing"]


def test_a_fresh_process_knows_every_kind(tmp_path: Path) -> None:
    for kind, make in THINGS.items():
        dr.save(make(), tmp_path / kind)
    script = f"""
import sys, pathlib, dreamreader
for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    before = [each for each in sys.modules if each.startswith("dreamreader.reft")]
    found = dreamreader.load_artifact(path)
    assert found.artifact_kind == path.name, path
    assert path.name >= "reft" or not before
    print(type(found).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    names = [type(THINGS[kind]()).__name__ for kind in sorted(THINGS)]
    assert done.stdout.split() == names, done.stderr


def test_caches_are_equal_value_by_value(tmp_path: Path) -> None:
    kept = cache()
    kept.save(tmp_path / "cache.safetensors")
    found = type(kept).load(tmp_path / "cache.safetensors")
    assert list(found) == list(kept) and found.sites == ("unet.a", "lm.h.0", "unet.b:q", "unet.c")
    for site, own in kept.items():
        other = found[site]
        for name in ("rows", "branches", "steps", "hw", "heads", "tokens", "positions"):
            assert same(getattr(own, name), getattr(other, name)), name
        assert own.tensor.dtype == other.tensor.dtype and own.axes == other.axes
        a, b = (
            each.contiguous().flatten().view(torch.uint8) for each in (own.tensor, other.tensor)
        )
        assert torch.equal(a, b)
    assert found["unet.a"].select(branch="cond", step=3).shape == (2, 1, 3, 4)
    type(kept)().save(tmp_path / "empty")
    assert len(load(tmp_path / "empty")) == 0


def test_what_was_recorded_patches_as_before(tmp_path: Path) -> None:
    reader = dr.load("shapes-unet")
    few = {"num_inference_steps": 2, "seeds": 0, "output_type": "latent"}
    had = reader.run("a red star", record="unet.mid_block", **few).cache
    dr.save(had, tmp_path / "cache")
    assert same(dict(dr.load_artifact(tmp_path / "cache")), dict(had))
    images = [
        reader.run("a blue cross", edits=dr.Patch("unet.mid_block", each), **few).images
        for each in (had, dr.load_artifact(tmp_path / "cache"))
    ]
    assert torch.equal(*images)


def test_word_maps_come_back_with_pictures_and_firing(tmp_path: Path) -> None:
    kept = word_maps()
    kept.save(tmp_path / "maps")
    found = type(kept).load(tmp_path / "maps")
    assert found.images[0].tobytes() == kept.images[0].tobytes() and found.images[0].size == (4, 2)
    assert found.firing is not None and kept.firing is not None
    assert list(found.firing) == list(kept.firing) and found.firing.notes == ["seen once"]
    assert found.firing[0].steps[9] == 0  # a counter, as it was
    assert len(found.overlay()[0]) == 1 and repr(found) == repr(kept)


def test_grids_are_values() -> None:
    assert grid() == grid() and grid() != 3
    other = grid()
    other.values[0, 0] += 1
    assert other != grid()


def test_views_of_one_tensor_are_saved_each(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    kept = Directions({"a": table[0], "b": table[1], "c": table[:, 0]}, "x", "y", "mean", "none")
    kept.save(tmp_path / "views")
    assert Directions.load(tmp_path / "views") == kept


def test_a_folder_with_the_file_is_one_too(tmp_path: Path) -> None:
    directions().save(tmp_path / "artifact.safetensors")
    assert load(tmp_path) == directions()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InvalidInput, match=r"nothing is a folder, without a file artifact\.safete"):
        load(tmp_path / "nothing")
    directions().save(tmp_path / "nothing" / "red.safetensors")
    with pytest.raises(InvalidInput, match="; name one of its files: red.safetensors"):
        load(tmp_path / "nothing")


def test_a_file_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"red: no such file; .* is empty"):
        load(tmp_path / "red")
    directions().save(tmp_path / "red-to-blue.safetensors")
    text = r"red-to-bleu: no such file; nearest in .*: red-to-blue\.safetensors"
    with pytest.raises(InvalidInput, match=text):
        load(tmp_path / "red-to-bleu")
    with pytest.raises(InvalidInput, match="the folder .*nowhere is not there either"):
        load(tmp_path / "nowhere" / "red")


def test_other_kinds_and_versions_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    directions().save(path)
    text = "x.safetensors holds no edits of dreamreader; it holds directions, which"
    with pytest.raises(InvalidInput, match=text):
        Edits.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(InvalidInput, match="x.safetensors holds no artifact of dreamreader"):
        load(path)
    for kind, version, text in (
        ("directions", 9, "is of version 9, this reads 1; update dreamreader"),
        ("training", 1, "is of version 1, this reads 2; make it anew"),
    ):
        content = json.dumps({"version": version})
        write_tensors(path, {}, {f"dreamreader.{kind}": content})
        with pytest.raises(InvalidInput, match=text):
            load(path)


@pytest.mark.parametrize("package", ["os", "dreamreader.__main__", "dreamreader.later", None, 3])
def test_a_file_imports_nothing_but_our_packages(package: object, tmp_path: Path) -> None:
    content = json.dumps({"version": 1, "package": package})
    write_tensors(tmp_path / "x", {}, {"dreamreader.later": content})
    with pytest.raises(InvalidInput, match="x holds later of .* which is not known here; import"):
        load(tmp_path / "x")


def changed(path: Path, kind: str, tensors: dict, content: dict) -> None:
    """Writes a file with other tensors and values, and the checksum of these."""
    had, metadata = read_tensors(path)
    known = json.loads(metadata[f"dreamreader.{kind}"])
    kept = {name: each for name, each in (had | tensors).items() if each is not None}
    text = json.dumps({k: v for k, v in (known | content).items() if v != "gone"})
    write_tensors(path, kept, {f"dreamreader.{kind}": text})


@pytest.mark.parametrize(
    ("kind", "tensors", "content", "text"),
    [
        ("directions", {"more": torch.ones(1)}, {}, "tensors that no directions has: more"),
        ("directions", {"unet.a": None}, {}, "tensor 'unet.a' is missing"),
        ("directions", {"unet.a": torch.ones(1, 1, 1)}, {}, r"\[steps, features\] is needed"),
        ("directions", {}, {"method": "gone"}, "no whole directions .KeyError: 'method'"),
        ("directions", {}, {"sites": 3}, "no whole directions .TypeError"),
        ("probe", {"bias.0": torch.ones(2, 3)}, {}, r"weights of \[1, 2\] MLPs"),
        ("probe", {"temperature": torch.ones(1, 5)}, {}, r"temperature must be \[1, 1\]"),
        ("reft", {"0.bias": torch.ones(2, 3)}, {}, r"bias of unet.a must be \[2, 2\]"),
        ("reft", {}, {"steps": 10**9}, "do not fit the tensors"),
        ("reft", {}, {"variant": "other"}, "unknown variant 'other'"),
        ("grid", {"base": torch.ones(3).double()}, {}, "3 cells and 2 rows"),
        ("grid", {"values": torch.ones(3, 2)}, {}, "values of a grid are float64"),
        ("cache", {"tensor_0": torch.ones(2, 2, 2, 3)}, {}, "unet.a: a tensor"),
        ("cache", {"tensor_0": torch.ones(3, 2, 2, 3, 4)}, {}, "with 2 rows, 2 branch, 2 steps"),
        ("edits", {}, {"edits": [{"kind": "Eval", "fields": {}}]}, "unknown kind of edit 'Eval'"),
        ("edits", {}, {"edits": [{"kind": "Scale", "fields": {"site": {"is": "eval", "of": 1}}}]},
         "unknown kind of value 'eval'"),
        ("word_maps", {"tensor_0": torch.ones(1, 1, 2)}, {}, "WordMaps: axes rows, words"),
    ],
)  # fmt: skip
def test_a_file_that_was_put_together_by_hand_is_checked(
    kind: str, tensors: dict, content: dict, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "made.safetensors"
    THINGS[kind]().save(path)
    changed(path, kind, tensors, content)
    with pytest.raises(InvalidInput, match=text) as caught:
        load(path)
    assert "made.safetensors" in str(caught.value)


def test_what_cannot_be_saved_says_so_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    directions().save(path)
    sparse = {"a": torch.eye(2).to_sparse()}
    with pytest.raises(InvalidInput, match="a is torch.sparse_coo torch.float32, which a safe"):
        Directions(sparse, "x", "y", "mean", "none").save(path)
    with pytest.raises(InvalidInput, match="list cannot be saved; kinds are .*directions, edits"):
        save([1], path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="float32 and RGBA|cannot be saved as"):
        maps = word_maps()
        type(maps)(maps.maps, maps.axes, maps.rows, maps.words, (), (), (), ["a.png"]).save(path)
    assert load(path) == directions()
    with pytest.raises(InvalidInput, match="file/y cannot be|cannot be written"):
        (tmp_path / "file").touch()
        reft().save(tmp_path / "file" / "y")


def test_two_classes_of_one_kind_are_refused() -> None:
    with pytest.raises(InvalidInput, match="kind 'reft' is dreamreader.reft.model.Reft already"):

        class Other(Artifact, kind="reft"):
            pass


def test_a_new_kind_is_one_class(tmp_path: Path) -> None:
    class Offset(Artifact, kind="a test's own"):
        def __init__(self, values: torch.Tensor):
            self.values = values

        def to_file(self):
            return {"values": self.values}, {}

        @classmethod
        def of_file(cls, tensors, content):
            return cls(tensors["values"])

    Offset(torch.ones(2)).save(tmp_path / "own")
    assert load(tmp_path / "own").values.tolist() == [1, 1]
