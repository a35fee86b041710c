"""manifest.json: written, read back, and refused."""

import json
import os

import pytest

from dreamreader._checked import read_json, write_json
from dreamreader.errors import InvalidInput
from dreamreader.store.manifest import Count, Job, Manifest

JOBS = (
    Job("a" * 64, (0, 3), {"capture": [{"sites": "unet.*"}]}, {"weights": "1f"}),
    Job("b" * 64, (3, 5)),
)
FULL = Manifest(JOBS, True, (Count("a:b", 2, 40),), (Count("c", -1, 1),))


@pytest.mark.parametrize("manifest", [Manifest(), FULL])
def test_what_is_written_is_read(manifest, tmp_path) -> None:
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert Manifest.there(tmp_path) and os.listdir(tmp_path) == ["manifest.json"]


def test_content(tmp_path) -> None:
    content = json.loads(FULL.write(tmp_path).read_text())
    assert content["format"] == 1 and content["kind"] == "dreamreader.store"
    assert content["jobs"][0]["units"] == [0, 3] and content["complete"] is True
    assert content["left_out"] == [{"site": "a:b", "step": 2, "rows": 40}]
    assert FULL.planned == 5 and Manifest().planned == 0


def test_a_folder_without_one(tmp_path) -> None:
    assert not Manifest.there(tmp_path / "none")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InvalidInput, match=f"{folder} is no store: it has no manifest.json"):
            Manifest.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}'])
def test_damaged(text, tmp_path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"manifest.json is damaged \(it has no checksum"):
        Manifest.read(tmp_path)


def test_a_changed_number(tmp_path) -> None:
    file = FULL.write(tmp_path)
    file.write_text(file.read_text().replace('"rows": 40', '"rows": 41'))
    with pytest.raises(InvalidInput, match=r"manifest.json is damaged \(it does not have its che"):
        Manifest.read(tmp_path)


def test_whole_but_not_a_manifest(tmp_path) -> None:
    content = {"format": 1, "kind": "dreamreader.store", "jobs": [{}]}
    write_json(tmp_path / "manifest.json", content)
    with pytest.raises(InvalidInput, match=r"manifest.json is damaged \(KeyError\('run'\)"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("change", [{"format": 2}, {"format": "1"}, {"kind": "other"}])
def test_another_format_or_kind(change, tmp_path) -> None:
    file = FULL.write(tmp_path)
    write_json(file, read_json(file) | change)
    found = change.get("format", "other")
    text = "is of format 2, this version of dreamreader reads up to 1" if found == 2 else ""
    with pytest.raises(InvalidInput, match=text or "manifest.json is "):
        Manifest.read(tmp_path)
